"""What the precision test asks: text, images and a video, by the model's own processor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlmcore.dataloading.positions import mrope_position_ids
from vlmcore.families import family_of, read_config
from vlmcore.models.vision import placeholders

Size = tuple[int, int]  # width, height

_IMAGES: dict[str, tuple[Size, ...]] = {
    "one image": ((96, 64),),
    "images of different sizes": ((64, 64), (128, 32)),
    "several images": ((64, 96), (64, 96), (64, 96)),
}
_FRAMES: tuple[Size, ...] = ((96, 64),) * 4
_QUESTION = "What is shown, and what is 12 + 30?"
_ANSWER = "An answer of a few tokens: 0123456789."
_NO_PIXELS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids",
              "second_per_grid_ts"}  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """A conversation of one question and one answer.

    Attributes:
        name: What it holds.
        inputs: What the processor returned.
        position_ids: [3, 1, S], by our own rule.
        is_placeholder: [S], where image features stand.
        num_prompt_tokens: Tokens before the answer.
    """

    name: str
    inputs: dict[str, Tensor]
    position_ids: Tensor
    is_placeholder: Tensor
    num_prompt_tokens: int

    @property
    def input_ids(self) -> Tensor:
        """[1, S]."""
        return self.inputs["input_ids"]

    @property
    def vision_inputs(self) -> dict[str, Tensor]:
        """The pixels and what goes with them."""
        return {name: value for name, value in self.inputs.items() if name not in _NO_PIXELS}


def precision_samples(hf_dir: Path) -> list[Sample]:
    """The samples that a model's family can take."""
    maker = _Maker(hf_dir)
    samples = [maker.sample("text")]
    if maker.family.vision is None:
        return samples
    for name, sizes in _IMAGES.items():
        images = [_pattern(*size, shift=31 * i) for i, size in enumerate(sizes)]
        samples.append(maker.sample(name, images=images))
    if getattr(maker.processor, "video_processor", None) is not None:
        frames = [_pattern(*size, shift=17 * i) for i, size in enumerate(_FRAMES)]
        video = np.stack([np.array(frame) for frame in frames])
        samples.append(maker.sample("video", videos=[video]))
    return samples


class _Maker:
    """Processor, placeholders and config of one model folder."""

    def __init__(self, hf_dir: Path) -> None:
        import transformers

        self.family = family_of(read_config(hf_dir))
        self.processor: Any
        if self.family.vision is None:
            self.processor = transformers.AutoTokenizer.from_pretrained(hf_dir)
            return
        self.processor = transformers.AutoProcessor.from_pretrained(hf_dir)
        config = transformers.AutoConfig.from_pretrained(hf_dir)
        self.tokens = placeholders(hf_dir, self.family, config)
        self.vision_config = config.vision_config

    def sample(self, name: str, **visuals: Any) -> Sample:
        """A question about `images` or `videos`, and its answer."""
        parts = [{"type": kind.removesuffix("s")} for kind, items in visuals.items() for _ in items]
        content: Any = [*parts, {"type": "text", "text": _QUESTION}] if visuals else _QUESTION
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": _ANSWER}]
        prompt, whole = (
            dict(self.processor(text=[text], return_tensors="pt", **visuals))
            for text in (self._render(turns[:1], prompt=True), self._render(turns, prompt=False))
        )
        ids, start = whole["input_ids"][0], prompt["input_ids"][0]
        shared = min(len(ids), len(start))
        return Sample(
            name=name,
            inputs=whole,
            position_ids=self._positions(whole)[:, None],
            is_placeholder=self._is_placeholder(ids),
            num_prompt_tokens=int((ids[:shared] == start[:shared]).cumprod(0).sum()),
        )

    def _render(self, turns: list[dict[str, Any]], *, prompt: bool) -> str:
        if self.processor.chat_template is None:  # a base model: text alone
            return "\n".join(turn["content"] for turn in turns)
        text = self.processor.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=prompt
        )
        return str(text)

    def _is_placeholder(self, ids: Tensor) -> Tensor:
        if self.family.vision is None:
            return torch.zeros_like(ids, dtype=torch.bool)
        found = ids == self.tokens.image
        return found if self.tokens.video is None else found | (ids == self.tokens.video)

    def _positions(self, inputs: dict[str, Tensor]) -> Tensor:
        ids = inputs["input_ids"][0]
        if self.family.vision is None or not self.family.vision.mrope:
            return torch.arange(len(ids)).expand(3, -1)
        none, seconds = torch.empty(0, 3), inputs.get("second_per_grid_ts")
        intervals = None
        if seconds is not None:
            intervals = (seconds * self.vision_config.tokens_per_second).tolist()
        return mrope_position_ids(
            ids,
            inputs.get("image_grid_thw", none).long().tolist(),
            image_token_id=self.tokens.image,
            merge_size=self.vision_config.spatial_merge_size,
            video_grids_thw=inputs.get("video_grid_thw", none).long().tolist(),
            video_token_id=self.tokens.video,
            video_intervals=intervals,
        )


def _pattern(width: int, height: int, *, shift: int) -> Image.Image:
    """An image in which no two patches are alike."""
    x = torch.arange(width).expand(height, -1) + shift
    y = torch.arange(height)[:, None].expand(-1, width)
    channels = torch.stack([x * 7 + y * 3, x * y, 255 - x * 2 + y * 5], dim=-1) % 256
    return Image.fromarray(channels.to(torch.uint8).numpy())
