"""What flows through the loader: a conversation, its tokens, and a row of several samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.energon import Sample
from megatron.energon.edataclass import edataclass
from torch import Tensor

from vlmcore.dataloading.encode import IGNORED, Message


@edataclass
class ConversationSample(Sample):
    """Turns as they were written, and the images of their `<image>` tags as original bytes."""

    messages: list[Message]
    images: list[bytes]


@edataclass
class TokenSample(Sample):
    """One encoded conversation; its images wait as bytes until the sample is placed in a row."""

    input_ids: Tensor  # [S]
    labels: Tensor  # [S], shifted
    position_ids: Tensor  # [3, S]
    images: list[bytes]
    pixel_values: Tensor | None = None  # [patches, patch]
    image_grid_thw: Tensor | None = None  # [images, 3]


@edataclass
class PackedRow(Sample):
    """Samples one behind the other in one row; `cu_seqlens` says where each begins.

    Shapes: T tokens of the row, n samples (padding counts as one).
    """

    input_ids: Tensor  # [T]
    labels: Tensor  # [T]
    position_ids: Tensor  # [3, T]
    cu_seqlens: Tensor  # [n + 1], int32
    pixel_values: Tensor | None  # [patches, patch]
    image_grid_thw: Tensor | None  # [images, 3]
    num_samples: int
    num_dropped: int  # samples dropped as too long since the row before


def pack_row(
    samples: Sequence[TokenSample], *, pad_token_id: int, multiple: int, num_dropped: int
) -> PackedRow:
    """Concatenates samples into one row, padded at the end to a multiple of `multiple` tokens."""
    lengths = [len(sample.input_ids) for sample in samples]
    padding = -sum(lengths) % multiple
    pieces = [(s.input_ids, s.labels, s.position_ids) for s in samples]
    if padding:
        pieces.append(
            (
                torch.full((padding,), pad_token_id),
                torch.full((padding,), IGNORED),
                torch.arange(padding).expand(3, -1),
            )
        )
        lengths.append(padding)
    ids, labels, positions = zip(*pieces, strict=True)
    pixels = [s.pixel_values for s in samples if s.pixel_values is not None]
    grids = [s.image_grid_thw for s in samples if s.image_grid_thw is not None]
    return PackedRow.derive_from(
        samples[0],
        input_ids=torch.cat(ids),
        labels=torch.cat(labels),
        position_ids=torch.cat(positions, dim=1),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        pixel_values=torch.cat(pixels) if pixels else None,
        image_grid_thw=torch.cat(grids) if grids else None,
        num_samples=len(samples),
        num_dropped=num_dropped,
    )
