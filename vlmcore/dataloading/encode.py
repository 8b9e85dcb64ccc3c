"""A conversation as token ids and labels, by the model's own tokenizer, template and processor.

Placeholders are found by token name and filled by the processor's own rule, so a model with another
vocabulary never trains on a placeholder that stands for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vlmcore.dataloading.expansion import Filled, fill
from vlmcore.dataloading.media import MediaLimits, MediaProcessor, Medium
from vlmcore.dataloading.positions import mrope_position_ids
from vlmcore.dataloading.rendering import (
    TAGS,
    ChatRenderer,
    GenerativeRenderer,
    LossScale,
    Message,
    Renderer,
)
from vlmcore.errors import DataError
from vlmcore.families import family_of, read_config

IGNORED = -100  # label of a token that carries no loss


class BadSampleError(DataError):
    """A sample that cannot be trained on: it is skipped, and counted under `cause`."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(detail)
        self.cause = cause


@dataclass(frozen=True)
class EncodedText:
    """Tokens of one sample; `labels[t]` is the token to predict at t + 1, or IGNORED.

    Shapes: input_ids [S], labels [S], loss_scale [S], position_ids [3, S].

    Attributes:
        loss_scale: float32, the weight of each label; 0 where there is none.
        media: Those that a cut has left, in the order of the text.
    """

    input_ids: Tensor
    labels: Tensor
    loss_scale: Tensor
    position_ids: Tensor
    media: tuple[Medium, ...] = ()


class ConversationEncoder:
    """Encodes conversations for one model folder.

    Args:
        hf_dir: Folder with config, tokenizer, chat template and processor.
        task: `sft`: chat template, loss on assistant turns; `pt`: plain text, loss on all of it.
        limits: Sizes of images and videos.
        loss_scale: Which turns of a chat carry loss.

    Raises:
        DataError: No chat template, or a limit that the family's processor cannot keep.
    """

    def __init__(
        self,
        hf_dir: Path,
        *,
        task: Literal["pt", "sft"],
        limits: MediaLimits | None = None,
        loss_scale: LossScale = "default",
    ) -> None:
        from transformers import AutoTokenizer

        config = read_config(hf_dir)
        self.family = family_of(config)
        self.media: MediaProcessor | None = None
        if self.family.vision is None:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(hf_dir)
        else:
            self.media = MediaProcessor(hf_dir, limits or MediaLimits())
            self.tokenizer = self.media.processor.tokenizer
        self._plain = task == "pt"
        self._read_tokens()
        self._tokens_per_second = config.get("vision_config", {}).get("tokens_per_second")
        self._renderer: Renderer = (
            GenerativeRenderer(self.tokenizer, self._placeholders)
            if self._plain
            else ChatRenderer(hf_dir, self.tokenizer, loss_scale=loss_scale)
        )

    def encode(
        self,
        messages: Sequence[Message],
        media: Sequence[Medium] = (),
        *,
        cut_at: int | None = None,
    ) -> EncodedText:
        """Tokens and labels of a conversation.

        Args:
            messages: Turns; `<image>` and `<video>` in their texts stand for media.
            media: In the order of those tags.
            cut_at: Tokens that are left at most; None: all. Where the end would fall into an image
                or video, it goes as a whole.

        Raises:
            BadSampleError: Tags and media do not match, or a placeholder stands in the text.
            DataError: The template is not prefix-stable.
        """
        filled = self._fill(messages, media)
        encoding = self._backend.encode(filled.text, add_special_tokens=self._plain)
        ends = chain.from_iterable(encoding.offsets)
        offsets = np.fromiter(ends, np.int64, 2 * len(encoding)).reshape(-1, 2)
        ids = np.array(encoding.ids, dtype=np.int64)
        ids, weights, blocks = self._expand(ids, offsets, filled)
        length = len(ids) if cut_at is None else self._cut(ids, blocks, cut_at)
        left = tuple(medium for medium, (_, end) in zip(filled.media, blocks, strict=True)
                     if end <= length)  # fmt: skip
        loss_scale = np.zeros(length, dtype=np.float32)
        loss_scale[:-1] = weights[1:length]
        (trained,) = (loss_scale > 0).nonzero()
        labels = np.full(length, IGNORED)
        labels[trained] = ids[trained + 1]
        input_ids = torch.from_numpy(ids[:length])
        return EncodedText(
            input_ids=input_ids,
            labels=torch.from_numpy(labels),
            loss_scale=torch.from_numpy(loss_scale),
            position_ids=self._positions(input_ids, left),
            media=left,
        )

    def _read_tokens(self) -> None:
        """Placeholders of the text, tokens that stand for features, and what no text may hold."""
        self._backend = self.tokenizer.backend_tokenizer  # twice as fast as transformers' wrapper
        self._backend.no_truncation()
        self._backend.no_padding()
        vision = self.family.vision
        self._placeholders = {} if self.media is None else self.media.placeholders
        self._feature_tokens: list[str] = []
        named: set[str] = set()
        if vision is not None:
            names = {"image": vision.image_token, "video": vision.video_token}
            self._feature_tokens = [name for name in names.values() if name is not None]
            named = {*vision.tokens.values(), *self._placeholders.values()}
        self._feature_ids = np.array(
            self.tokenizer.convert_tokens_to_ids(self._feature_tokens), dtype=np.int64
        )
        self._reserved = sorted(named - {*TAGS})
        self._reserved_ids = set(self.tokenizer.convert_tokens_to_ids([*named]))

    def _fill(self, messages: Sequence[Message], media: Sequence[Medium]) -> Filled:
        for message in messages:
            for token in self._reserved:
                if token in message["content"]:
                    raise BadSampleError("literal_placeholder", f"the text itself says {token}")
        rendered = self._renderer.render(messages)
        filled = fill(
            rendered,
            media,
            placeholders=self._placeholders,
            feature_tokens=self._feature_tokens,
        )
        if filled is None:
            found = {kind: rendered.text.count(token) for kind, token in self._placeholders.items()}
            raise BadSampleError(
                "tag_mismatch", f"{len(media)} images and videos, placeholders: {found}"
            )
        return filled

    def _expand(
        self, ids: np.ndarray, offsets: np.ndarray, filled: Filled
    ) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
        """Ids and weights with runs at full length, and the tokens (first, end) of each medium."""
        starts, ends = offsets.T
        times = np.ones(len(ids), dtype=np.int64)
        (features,) = (ids[:, None] == self._feature_ids).any(axis=1).nonzero()
        assert len(features) == len(filled.repeats)
        times[features] = filled.repeats
        weights = np.zeros(len(ids), dtype=np.float32)
        for start, end, weight in filled.spans:
            weights[(starts >= start) & (ends <= end)] = weight
        through = times.cumsum()  # tokens up to each one's end
        blocks = []
        for start, end in filled.blocks:
            first, last = starts.searchsorted([start, end])
            weights[first:last] = 0
            blocks.append((int(through[first] - times[first]), int(through[last - 1])))
        return ids.repeat(times), weights.repeat(times), blocks

    def _cut(self, ids: np.ndarray, blocks: Sequence[tuple[int, int]], cut_at: int) -> int:
        """Tokens that are left: no part of a medium, nor what opens one that is gone."""
        if len(ids) <= cut_at:
            return len(ids)
        length = next((first for first, end in blocks if first < cut_at < end), cut_at)
        inside = {end for _, end in blocks}
        while length and length not in inside and int(ids[length - 1]) in self._reserved_ids:
            length -= 1
        return length

    def _positions(self, input_ids: Tensor, media: Sequence[Medium]) -> Tensor:
        vision = self.family.vision
        if vision is None or not vision.mrope or self.media is None:
            return torch.arange(len(input_ids)).expand(3, -1)
        images = [medium.grid for medium in media if medium.video is None]
        videos = [medium for medium in media if medium.video is not None]
        rate = self._tokens_per_second
        return mrope_position_ids(
            input_ids,
            [grid for grid in images if grid is not None],
            image_token_id=int(self._feature_ids[0]),
            merge_size=self.media.merge_size,
            video_grids_thw=[video.grid for video in videos if video.grid is not None],
            video_token_id=int(self._feature_ids[1]),
            video_intervals=None if rate is None else [rate * v.seconds_per_step for v in videos],
        )


def dummy_vision_inputs(encoder: ConversationEncoder) -> dict[str, Tensor]:
    """What the vision side of a rank looks at where a row holds no image; none for a text model.

    Its features times zero, added to the embeddings, make the rank's backward reach the same
    weights as that of ranks whose rows hold images: a reduction over ranks waits for all of them.
    """
    return {} if encoder.media is None else encoder.media.smallest()
