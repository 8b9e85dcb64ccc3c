"""Pixels as the processor makes them, and as the 256 levels a channel that they come from.

Processors resize bytes and normalise last, so each float is one of 256 of its channel. As bytes the
tensors are a quarter as large, and come back bit by bit by the processor's own normalisation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PART = 1 << 18  # elements worked on at once, so that they stay in the processor's cache


def to_levels(pixels: Tensor, processor: Any) -> Tensor | None:
    """The bytes [same shape] that `processor` normalises into `pixels`; None: there are none.

    Args:
        pixels: [N, 3 · …] patches, or [..., 3, height, width]; float32.
        processor: transformers' image or video processor that made them.
    """
    channels = _by_channel(pixels)
    if channels is None or pixels.dtype != torch.float32 or not _normalises_bytes(processor):
        return None
    ends = torch.tensor([0, 255], dtype=torch.uint8).expand(1, 3, 1, 2)
    low, high = _normalised(ends, processor).view(3, 1, 1, 2).unbind(-1)
    scale = 255 / (high - low)
    offset = 0.5 - low * scale  # what follows cuts fractions off
    levels = torch.empty(channels.shape, dtype=torch.uint8)
    for part, found in _parts(channels, levels):
        found.copy_((part * scale).add_(offset).clamp_(0, 255))
        if not _same_bits(_normalised(found, processor), part):
            return None
    return levels.view(pixels.shape)


def from_levels(levels: Tensor, processor: Any) -> Tensor:
    """What `processor` makes of bytes: float32 of the same shape."""
    channels = _by_channel(levels)
    assert channels is not None
    pixels = torch.empty(channels.shape)
    for part, made in _parts(channels, pixels):
        made.copy_(_normalised(part, processor))
    return pixels.view(levels.shape)


def _parts(first: Tensor, second: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = max(1, _PART // max(1, first[:1].numel()))
    return zip(first.split(rows), second.split(rows), strict=True)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    # torch.equal takes five times as long
    return np.array_equal(one.numpy().view(np.int32), other.numpy().view(np.int32))


def _by_channel(pixels: Tensor) -> Tensor | None:
    """[N, 3, height, width], where the pixels can be seen so."""
    if pixels.ndim >= 4 and pixels.shape[-3] == 3:
        return pixels.flatten(0, -4)
    if pixels.ndim == 2 and pixels.shape[1] % 3 == 0:  # a patch's channels one behind the other
        return pixels.view(len(pixels), 3, 1, -1)
    return None


def _normalises_bytes(processor: Any) -> bool:
    """Not so of transformers' processors on PIL alone."""
    return hasattr(processor, "rescale_and_normalize")


def _normalised(levels: Tensor, processor: Any) -> Tensor:
    result: Tensor = processor.rescale_and_normalize(
        levels,
        processor.do_rescale,
        processor.rescale_factor,
        processor.do_normalize,
        processor.image_mean,
        processor.image_std,
    )
    return result
