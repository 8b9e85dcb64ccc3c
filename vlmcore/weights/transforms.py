"""Pure tensor transforms between HF and Megatron-Core layouts; both directions side by side.

Layout differences handled here:
- q, k, v: HF keeps three matrices ordered by head; Megatron-Core interleaves them by kv group, so
  that tensor parallel ranks cut between groups (megatron-core 0.16, SelfAttention).
- experts stored input dimension first are transposed.

Shape suffixes: N query heads, G kv groups, Q = N / G query heads a group, D head dim, R = rows of
the fused matrix (G · (Q + 2) · D), `…` the trailing dimension H of a weight, none for a bias.

All of it is reshaping and placing, so torch tensors and numpy arrays go through alike: ranks use
the former, the converter's workers the latter, since numpy starts in a tenth of torch's time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

_ROWS = 32  # transposed at once: a third of the time that numpy takes for the whole matrix
Array = Any  # torch.Tensor or numpy.ndarray; what goes in comes out


def fuse_qkv(q: Array, k: Array, v: Array, *, num_query_groups: int) -> Array:
    """HF's q [N·D, …], k and v [G·D, …] as Megatron's interleaved [R, …]."""
    groups, rest = num_query_groups, q.shape[1:]
    by_group = [x.reshape(groups, -1, *rest) for x in (q, k, v)]
    return _concatenate(by_group, axis=1).reshape(-1, *rest)


def split_qkv(
    fused: Array, *, num_query_groups: int, kv_channels: int
) -> tuple[Array, Array, Array]:
    """Megatron's interleaved [R, …] as HF's q [N·D, …], k and v [G·D, …]."""
    groups, dim = num_query_groups, kv_channels
    rest = fused.shape[1:]
    by_group = fused.reshape(groups, -1, *rest)
    parts = by_group[:, : -2 * dim], by_group[:, -2 * dim : -dim], by_group[:, -dim:]
    q, k, v = (part.reshape(-1, *rest) for part in parts)
    return q, k, v


def _transposed(matrix: Array) -> Array:
    if not isinstance(matrix, np.ndarray):
        return matrix.T
    turned = np.empty(matrix.shape[::-1], matrix.dtype)
    for row in range(0, len(matrix), _ROWS):
        turned[:, row : row + _ROWS] = matrix[row : row + _ROWS].T
    return turned


def _concatenate(parts: Sequence[Array], *, axis: int) -> Array:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts, axis=axis)
    import torch

    return torch.cat(list(parts), dim=axis)


class Transform(Protocol):
    """What turns the HF pieces of a region into its Megatron tensor, and back exactly."""

    def to_mcore(self, *pieces: Array) -> Array:
        """The Megatron tensor, without the dimensions of the layer stack."""
        ...

    def to_hf(self, tensor: Array) -> tuple[Array, ...]:
        """The HF pieces."""
        ...


@dataclass(frozen=True)
class Copy:
    """One piece, byte for byte."""

    def to_mcore(self, *pieces: Array) -> Array:  # noqa: D102
        return pieces[0]

    def to_hf(self, tensor: Array) -> tuple[Array, ...]:  # noqa: D102
        return (tensor,)


@dataclass(frozen=True)
class InterleaveQKV:
    """q, k and v, weights or biases."""

    num_query_groups: int
    kv_channels: int

    def to_mcore(self, *pieces: Array) -> Array:  # noqa: D102
        q, k, v = pieces
        return fuse_qkv(q, k, v, num_query_groups=self.num_query_groups)

    def to_hf(self, tensor: Array) -> tuple[Array, ...]:  # noqa: D102
        return split_qkv(
            tensor, num_query_groups=self.num_query_groups, kv_channels=self.kv_channels
        )


@dataclass(frozen=True)
class Transpose:
    """One matrix stored the other way round."""

    def to_mcore(self, *pieces: Array) -> Array:  # noqa: D102
        return _transposed(pieces[0])

    def to_hf(self, tensor: Array) -> tuple[Array, ...]:  # noqa: D102
        return (_transposed(tensor),)
