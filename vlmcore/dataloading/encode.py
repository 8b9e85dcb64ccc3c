"""A conversation as token ids and labels, by the model's own tokenizer, template and processor.

Image placeholders are found by token name and repeated by the image processor's own rule, so a
model with another vocabulary never trains on a placeholder that stands for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from vlmcore.dataloading.positions import mrope_position_ids
from vlmcore.errors import DataError
from vlmcore.families import family_of, read_config

IGNORED = -100  # label of a token that carries no loss
IMAGE_TAG = "<image>"

Message = dict[str, str]


@dataclass(frozen=True)
class EncodedText:
    """Tokens of one sample; `labels[t]` is the token to predict at t + 1, or IGNORED.

    Shapes: input_ids [S], labels [S], position_ids [3, S].
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor


class ConversationEncoder:
    """Encodes conversations for one model folder.

    Args:
        hf_dir: Folder with config, tokenizer, chat template and processor.
        task: `sft` puts loss on assistant turns alone, `pt` on every token.
        max_pixels: Pixels of an image at most; None keeps the processor's own limit.

    Raises:
        DataError: The tokenizer has no chat template.
    """

    def __init__(
        self, hf_dir: Path, *, task: Literal["pt", "sft"], max_pixels: int | None = None
    ) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer

        self.task = task
        self.family = family_of(read_config(hf_dir))
        self.tokenizer: Any = AutoTokenizer.from_pretrained(hf_dir)
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{hf_dir}: the tokenizer has no chat template; add chat_template.jinja"
            )
        self.image_processor: Any = None
        self.image_token_id: Any = -1
        if self.family.vision is not None:
            limits = {} if max_pixels is None else {"max_pixels": max_pixels}
            self.image_processor = AutoImageProcessor.from_pretrained(hf_dir, **limits)
            self.image_token_id = self.tokenizer.convert_tokens_to_ids(
                self.family.vision.image_token
            )

    def encode(
        self, messages: Sequence[Message], grids_thw: Sequence[Sequence[int]]
    ) -> EncodedText:
        """Tokens and labels of a conversation whose images have these patch grids.

        Raises:
            DataError: The template is not prefix-stable, or tags and images do not match.
        """
        turns = [_with_image_parts(message) for message in messages]
        text = self._render(turns)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        trained = self._trained_spans(turns, text)
        counts = [self._num_features(grid) for grid in grids_thw]
        images = iter(counts)
        ids: list[int] = []
        keep: list[bool] = []
        for token, (start, end) in zip(
            encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            if token == self.image_token_id:
                count = next(images, None)
                if count is None:
                    raise DataError(f"more than {len(counts)} image placeholders in {text!r}")
                ids += [token] * count
                keep += [False] * count
            else:
                ids.append(token)
                keep.append(any(a <= start and end <= b for a, b in trained))
        if next(images, None) is not None:
            raise DataError(f"fewer than {len(counts)} image placeholders in {text!r}")
        input_ids = torch.tensor(ids)
        labels = torch.where(torch.tensor(keep), input_ids, IGNORED)
        shifted = torch.cat([labels[1:], torch.tensor([IGNORED])])
        return EncodedText(input_ids, shifted, self._positions(input_ids, grids_thw))

    def grid(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Patches over time, height and width of an image of (width, height) pixels."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        processor = self.image_processor
        width, height = size
        new_height, new_width = smart_resize(
            height,
            width,
            factor=processor.patch_size * processor.merge_size,
            min_pixels=processor.size["shortest_edge"],
            max_pixels=processor.size["longest_edge"],
        )
        return (1, new_height // processor.patch_size, new_width // processor.patch_size)

    def patches(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Patches [N, channels · time · height · width of a patch] and grids [images, 3]."""
        out = self.image_processor(
            images=[image.convert("RGB") for image in images], return_tensors="pt"
        )
        return out["pixel_values"], out["image_grid_thw"]

    def _positions(self, input_ids: Tensor, grids_thw: Sequence[Sequence[int]]) -> Tensor:
        if self.family.vision is None or not self.family.vision.mrope:
            return torch.arange(len(input_ids)).expand(3, -1)
        return mrope_position_ids(
            input_ids,
            grids_thw,
            image_token_id=self.image_token_id,
            merge_size=self.image_processor.merge_size,
        )

    def _num_features(self, grid: Sequence[int]) -> int:
        t, h, w = grid
        return int(t * h * w // self.image_processor.merge_size**2)

    def _render(self, messages: Sequence[Any], *, prompt: bool = False) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=prompt
            )
        )

    def _trained_spans(self, messages: Sequence[Any], text: str) -> list[tuple[int, int]]:
        """Character spans of `text` that carry loss, from rendering every prefix."""
        if self.task == "pt":
            return [(0, len(text))]
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:i], prompt=True)
            through = self._render(messages[: i + 1])
            if not (text.startswith(through) and through.startswith(before)):
                raise DataError(
                    "the chat template is not prefix-stable: a turn renders differently once "
                    "others follow it, so its tokens cannot be told apart; use another template"
                )
            # what follows the end-of-turn token (a newline) is never predicted
            spans.append((len(before), len(through.rstrip())))
        return spans


def _with_image_parts(message: Message) -> dict[str, Any]:
    """A message whose `<image>` tags are content parts, as chat templates want them."""
    if IMAGE_TAG not in message["content"]:
        return dict(message)
    parts: list[dict[str, str]] = []
    for i, text in enumerate(message["content"].split(IMAGE_TAG)):
        if i:
            parts.append({"type": "image"})
        if text:
            parts.append({"type": "text", "text": text})
    return {"role": message["role"], "content": parts}
