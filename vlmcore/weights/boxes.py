"""Boxes of global tensors: where two of them meet, and where one stands inside another."""

from __future__ import annotations

Shape = tuple[int, ...]

VOCABULARY = ("word_embeddings.weight", "output_layer.weight")  # rows are padded by Megatron


def overlap(
    offset: Shape, shape: Shape, other_offset: Shape, other_shape: Shape
) -> tuple[Shape, Shape] | None:
    """First and one-past-last index of what two boxes of one tensor share; None for nothing."""
    low = tuple(map(max, offset, other_offset))
    ends = zip(offset, shape, other_offset, other_shape, strict=True)
    high = tuple(min(a + n, b + m) for a, n, b, m in ends)
    return None if any(a >= b for a, b in zip(low, high, strict=True)) else (low, high)


def window(low: Shape, high: Shape, origin: Shape) -> tuple[slice, ...]:
    """Where a box stands inside another one that begins at `origin`."""
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))


def swap(shape: Shape) -> Shape:
    """A shape or offset with the last two dimensions the other way round."""
    *outer, rows, columns = shape
    return (*outer, columns, rows)
