"""Tokenizers, chat templates and processor files of the tiny models, with the real token names.

All tokenizers are the builtin donor's byte-level one with Qwen's special tokens. Families that know
other tokens add them behind it, as InternVL and LLaVA-OneVision do with Qwen's; token ids of a
config are looked up by these names.
"""

import json
from pathlib import Path
from typing import Any

from vlmcore.surgery.builtin import CHAT_TEMPLATE, build_tiny_qwen3

MERGE_SIZE = 2
TILE = 56  # pixels a side of an InternVL tile, 4 × 4 patches of 14
CROP = 42  # pixels a side of a LLaVA crop, 3 × 3 patches of 14: odd, as the real 27 × 27 is
GRID_PINPOINTS = [[CROP, CROP], [CROP, 2 * CROP], [2 * CROP, CROP], [2 * CROP, 2 * CROP]]
MEAN_STD = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}

QWEN_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}

Json = dict[str, Any]


def save_tokenizer(folder: Path, *, seed: int) -> Any:
    """The text models' tokenizer, saved into `folder`."""
    from transformers import AutoTokenizer

    build_tiny_qwen3(folder, seed=seed)  # for its tokenizer; the caller's model overwrites the rest
    return AutoTokenizer.from_pretrained(folder)


def save_qwen_processor(
    folder: Path, name: str, *, seed: int, patch_size: int, video_processor: str
) -> Any:
    """Tokenizer and `name` as processor: patches of any resolution, merged two by two."""
    tokenizer = save_tokenizer(folder, seed=seed)
    unit = patch_size * MERGE_SIZE  # pixels a side of one merged image token
    common = {
        **MEAN_STD,
        "patch_size": patch_size,
        "temporal_patch_size": 2,
        "merge_size": MERGE_SIZE,
        "size": {"shortest_edge": unit**2, "longest_edge": (16 * unit) ** 2},
        "processor_class": name,
    }
    _write(folder, "preprocessor", {**common, "image_processor_type": "Qwen2VLImageProcessor"})
    _write(folder, "video_preprocessor", {**common, "video_processor_type": video_processor})
    return tokenizer


def save_internvl_processor(folder: Path, *, seed: int) -> Any:
    """Tokenizer and processor: tiles of `TILE` pixels, a thumbnail, one tile a video frame."""
    tokenizer = _extended(
        folder, seed=seed, tokens=INTERNVL_TOKENS, image="<IMG_CONTEXT>", video="<video>"
    )
    common = {**MEAN_STD, "size": {"height": TILE, "width": TILE}}
    image = {"image_processor_type": "GotOcr2ImageProcessor", "min_patches": 1, "max_patches": 6}
    _write(folder, "preprocessor", {**common, **image})
    _write(
        folder, "video_preprocessor", {**common, "video_processor_type": "InternVLVideoProcessor"}
    )
    _write(folder, "processor", {"processor_class": "InternVLProcessor", "image_seq_length": 4})
    return tokenizer


def save_llava_processor(folder: Path, *, seed: int) -> Any:
    """Tokenizer and processor: one centre crop of `CROP` pixels an image."""
    tokens = {"image_token": "<image>"}
    tokenizer = _extended(folder, seed=seed, tokens=tokens, image="<image>")
    crop = {
        **MEAN_STD,
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": CROP},
        "crop_size": {"height": CROP, "width": CROP},
    }
    _write(folder, "preprocessor", crop)
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": 14,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    _write(folder, "processor", processor)
    return tokenizer


def save_llava_onevision_processor(folder: Path, *, seed: int) -> Any:
    """Tokenizer and processor: crops of `CROP` pixels after `GRID_PINPOINTS`, pooled frames."""
    tokens = {"image_token": "<image>", "video_token": "<video>"}
    tokenizer = _extended(folder, seed=seed, tokens=tokens, image="<image>", video="<video>")
    common = {**MEAN_STD, "size": {"height": CROP, "width": CROP}}
    image = {
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "image_grid_pinpoints": GRID_PINPOINTS,
    }
    video = {"video_processor_type": "LlavaOnevisionVideoProcessor"}
    processor = {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": 9,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
    }
    _write(folder, "preprocessor", {**common, **image})
    _write(folder, "video_preprocessor", {**common, **video})
    _write(folder, "processor", processor)
    return tokenizer


def _extended(
    folder: Path, *, seed: int, tokens: dict[str, str], image: str, video: str | None = None
) -> Any:
    """The tokenizer with `tokens` behind its own and `image` and `video` in its template."""
    from transformers import AutoTokenizer

    save_tokenizer(folder, seed=seed)
    tokenizer = AutoTokenizer.from_pretrained(folder, extra_special_tokens=tokens)
    template = CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", image)
    if video is not None:
        template = template.replace("<|vision_start|><|video_pad|><|vision_end|>", video)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def _write(folder: Path, name: str, content: Json) -> None:
    (folder / f"{name}_config.json").write_text(json.dumps(content, indent=2) + "\n")
