"""Tiny models that can fail: whatever a conversion or a layout may confuse differs here.

Fewer kv heads than heads, a head dim that is not hidden / heads, gate unlike up, norms away from 1,
a vocabulary that tensor parallel ranks must pad, three layers so that deepstack features (after the
first two) still pass through a layer, and drawn weights large enough that each of them shows in the
logits.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 321  # odd: padded at tensor parallel 2
TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}
MROPE = {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 2,
    "out_hidden_size": TEXT["hidden_size"],
    "deepstack_visual_indexes": [0, 1],
    "patch_size": 16,
    "spatial_merge_size": 2,
    "num_position_embeddings": 64,
}
TOKEN_IDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def build_qwen3(folder: Path, *, tied: bool = False, seed: int = 1, **text: Any) -> Path:
    """A Qwen3 with its tokenizer; `text` changes fields of the config."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from vlmcore.surgery.builtin import build_tiny_qwen3

    build_tiny_qwen3(folder, seed=seed)  # for its tokenizer
    config = Qwen3Config(**(TEXT | text), tie_word_embeddings=tied)
    return _save(Qwen3ForCausalLM(config), folder, seed=seed)


def build_qwen3_vl(folder: Path, *, tied: bool = False, seed: int = 2, **text: Any) -> Path:
    """A Qwen3-VL with tokenizer and processor; `text` changes fields of the text config."""
    from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    from vlmcore.surgery.builtin import build_tiny_qwen3_vl

    build_tiny_qwen3_vl(folder, seed=seed)  # for its tokenizer and processor
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = TEXT | text
    text["rope_parameters"] = text["rope_parameters"] | MROPE
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=VISION | {"out_hidden_size": text["hidden_size"]},
        tie_word_embeddings=tied,
        **{field: tokenizer.convert_tokens_to_ids(name) for field, name in TOKEN_IDS.items()},
    )
    return _save(Qwen3VLForConditionalGeneration(config), folder, seed=seed)


BUILDERS: dict[str, Callable[..., Path]] = {"qwen3": build_qwen3, "qwen3_vl": build_qwen3_vl}


def _save(model: Any, folder: Path, *, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, weight[0].numel() ** -0.5, generator=generator)
            elif name.endswith("bias"):
                weight.normal_(0.0, 0.2, generator=generator)
            else:
                weight.uniform_(0.5, 1.5, generator=generator)
    model.save_pretrained(folder)
    return folder
