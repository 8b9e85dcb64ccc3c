"""What flows through the loader: a conversation, its tokens, and a row of several samples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import field, fields
from typing import Any

import numpy as np
import torch
from megatron.energon import Sample
from megatron.energon.edataclass import edataclass
from PIL import Image
from torch import Tensor

from vlmcore.dataloading.encode import IGNORED
from vlmcore.dataloading.media import Medium
from vlmcore.dataloading.rendering import Message

_SENT_AS_BYTES = 2**16  # bytes at most; in shared memory each tensor costs a call of its sender


@edataclass
class ConversationSample(Sample):
    """Turns as they were written, and the files that their tags stand for, as original bytes."""

    messages: list[Message]
    images: list[bytes]
    videos: list[bytes] = field(default_factory=list)


@edataclass
class TokenSample(Sample):
    """One encoded conversation; its media wait as bytes until the sample is placed in a row."""

    input_ids: Tensor  # [S]
    labels: Tensor  # [S], shifted
    loss_scale: Tensor  # [S], weights of the labels
    position_ids: Tensor  # [3, S]
    media: tuple[Medium, ...] = ()
    files: list[bytes] = field(default_factory=list)  # of the media, in their order
    # once the sample has its place: the media decoded, or what the vision side wants of them
    pixels: list[Image.Image | np.ndarray] = field(default_factory=list)
    vision: dict[str, Tensor] = field(default_factory=dict)


@edataclass
class PackedRow(Sample):
    """Samples one behind the other in one row; `cu_seqlens` says where each begins.

    Shapes: T tokens of the row, n samples (padding counts as one).
    """

    input_ids: Tensor  # [T]
    labels: Tensor  # [T]
    loss_scale: Tensor  # [T], float32: weights of the labels, 0 where there is none
    position_ids: Tensor  # [3, T]
    cu_seqlens: Tensor  # [n + 1], int32
    vision: dict[str, Tensor]  # the processor's outputs for all media in turn; empty: text alone
    keys: tuple[str, ...]  # of its samples
    dropped: dict[str, int]  # samples left out since the row before, by cause

    def __reduce__(self) -> tuple[Any, ...]:
        """How a row comes from a loader's process: what is small, as bytes."""
        values = {one.name: _packed(getattr(self, one.name)) for one in fields(self)}
        return _row_of, (values,)

    @property
    def num_samples(self) -> int:
        """Samples of the row."""
        return len(self.keys)

    @property
    def num_dropped(self) -> int:
        """Samples left out since the row before, for whatever cause."""
        return sum(self.dropped.values())


def _row_of(values: dict[str, Any]) -> PackedRow:
    return PackedRow(**{name: _unpacked(value) for name, value in values.items()})


def _packed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _packed(one) for name, one in value.items()}
    small = isinstance(value, Tensor) and value.nbytes <= _SENT_AS_BYTES
    return value.numpy() if small else value


def _unpacked(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _unpacked(one) for name, one in value.items()}
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def pack_row(
    samples: Sequence[TokenSample],
    *,
    vision: Sequence[Mapping[str, Tensor]],
    pad_token_id: int,
    multiple: int,
    dropped: Mapping[str, int],
) -> PackedRow:
    """Concatenates samples into one row, padded at the end to a multiple of `multiple` tokens.

    Args:
        samples: In turn.
        vision: Tensors of their media, in turn; each of one sample's or of several.
        pad_token_id: What padding consists of.
        multiple: Of so many tokens is a row.
        dropped: Samples left out since the row before, by cause.
    """
    lengths = [len(sample.input_ids) for sample in samples]
    padding = -sum(lengths) % multiple
    pieces = [(s.input_ids, s.labels, s.loss_scale, s.position_ids) for s in samples]
    if padding:
        pieces.append(
            (
                torch.full((padding,), pad_token_id),
                torch.full((padding,), IGNORED),
                torch.zeros(padding),
                torch.arange(padding).expand(3, -1),
            )
        )
        lengths.append(padding)
    ids, labels, scales, positions = zip(*pieces, strict=True)
    tensors: defaultdict[str, list[Tensor]] = defaultdict(list)
    for part in vision:
        for name, value in part.items():
            tensors[name].append(value)
    return PackedRow.derive_from(
        samples[0],
        input_ids=torch.cat(ids),
        labels=torch.cat(labels),
        loss_scale=torch.cat(scales),
        position_ids=torch.cat(positions, dim=1),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        vision={
            name: values[0] if len(values) == 1 else torch.cat(values)
            for name, values in tensors.items()
        },
        keys=tuple(sample.__key__ for sample in samples),
        dropped=dict(dropped),
    )
