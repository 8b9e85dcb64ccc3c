"""Tiny models that can fail: whatever a conversion or a layout may confuse differs here.

Fewer kv heads than heads, a head dim that is not hidden / heads where the family has one, gate
unlike up, norms away from 1, an odd vocabulary that tensor parallel ranks must pad, four experts of
which two are taken and whose width is neither the hidden size nor its half, three layers so that
deepstack features (after the first two) still pass through a layer, one of three vision layers with
full attention where the others have windows, and drawn weights large enough that each of them shows
in the logits. (LLaVA's tower is the exception by nature: features leave before its last layer.)
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
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
# Wavelengths of a head of 16 lie on both sides of, and inside, the band that llama3 smooths.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
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
WINDOWED_VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 56,  # two merged tokens a side
    "fullatt_block_indexes": [1],
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 14,
}


def build_qwen2(folder: Path, *, tied: bool = False, seed: int = 3, **text: Any) -> Path:
    return _build_text("qwen2", folder, tied=tied, seed=seed, **text)


def build_qwen3(folder: Path, *, tied: bool = False, seed: int = 1, **text: Any) -> Path:
    return _build_text("qwen3", folder, tied=tied, seed=seed, **text)


def build_qwen3_moe(folder: Path, *, tied: bool = False, seed: int = 4, **text: Any) -> Path:
    return _build_text("qwen3_moe", folder, tied=tied, seed=seed, **text)


def build_llama(
    folder: Path, *, tied: bool = False, seed: int = 5, rope_type: str = "default", **text: Any
) -> Path:
    """A Llama; with `rope_type="llama3"` its rotary frequencies are those of Llama 3.1."""
    rope = {"rope_parameters": LLAMA3_ROPE} if rope_type == "llama3" else {}
    return _build_text("llama", folder, tied=tied, seed=seed, **(rope | text))


def build_qwen2_5_vl(folder: Path, *, tied: bool = False, seed: int = 6, **text: Any) -> Path:
    """A Qwen2.5-VL; `text` changes fields of the text config, whose M-RoPE follows its heads."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = _save_qwen2_5_processor(folder, "Qwen2_5_VLProcessor", seed=seed)
    fields = text_fields("qwen2", tokenizer, **({"hidden_size": 64} | text))
    half = fields["hidden_size"] // fields["num_attention_heads"] // 2
    part = half * 3 // 8  # the real [16, 24, 24] is made of two eighths and twice three
    section = {"mrope_section": [half - 2 * part, part, part]}
    config = Qwen2_5_VLConfig(
        text_config=fields | {"rope_parameters": fields["rope_parameters"] | section},
        vision_config=WINDOWED_VISION
        | {"out_hidden_size": fields["hidden_size"], "tokens_per_second": 2},
        tie_word_embeddings=tied,
        **_qwen_token_ids(tokenizer),
    )
    return _save(Qwen2_5_VLForConditionalGeneration(config), folder, seed=seed)


def build_qwen3_vl(folder: Path, *, tied: bool = False, seed: int = 2, **text: Any) -> Path:
    """A Qwen3-VL with tokenizer and processor; `text` changes fields of the text config."""
    from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    from vlmcore.surgery.builtin import build_tiny_qwen3_vl

    build_tiny_qwen3_vl(folder, seed=seed)  # for its tokenizer and processor
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = Qwen3VLConfig(
        **_qwen3_vl_parts(text_fields("qwen3", tokenizer, **text)),
        tie_word_embeddings=tied,
        **_qwen_token_ids(tokenizer),
    )
    return _save(Qwen3VLForConditionalGeneration(config), folder, seed=seed)


def build_qwen3_vl_moe(folder: Path, *, tied: bool = False, seed: int = 7, **text: Any) -> Path:
    """A Qwen3-VL-MoE with tokenizer and processor; `text` changes fields of the text config."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    from tests.tiny.processors import save_qwen_processor

    tokenizer = save_qwen_processor(
        folder,
        "Qwen3VLProcessor",
        seed=seed,
        patch_size=VISION["patch_size"],
        video_processor="Qwen3VLVideoProcessor",
    )
    config = Qwen3VLMoeConfig(
        **_qwen3_vl_parts(
            text_fields("qwen3_moe", tokenizer, **text) | {"tie_word_embeddings": tied}
        ),
        tie_word_embeddings=tied,
        **_qwen_token_ids(tokenizer),
    )
    return _save(Qwen3VLMoeForConditionalGeneration(config), folder, seed=seed)


def build_exaone4_5(
    folder: Path, *, tied: bool = False, seed: int = 8, text_type: str = "qwen3", **text: Any
) -> Path:
    """The Exaone4.5 shell: Qwen2.5-VL's tower before a text model of `text_type`."""
    from transformers import Exaone4_5_Config, Exaone4_5_ForConditionalGeneration

    tokenizer = _save_qwen2_5_processor(folder, "Exaone4_5_Processor", seed=seed)
    fields = text_fields(text_type, tokenizer, **text)
    config = Exaone4_5_Config(
        text_config=fields | {"model_type": text_type, "tie_word_embeddings": tied},
        vision_config=WINDOWED_VISION
        | {
            "out_hidden_size": fields["hidden_size"],
            "num_key_value_heads": WINDOWED_VISION["num_heads"],
        },
        tie_word_embeddings=tied,
        **_qwen_token_ids(tokenizer),
    )
    return _save(Exaone4_5_ForConditionalGeneration(config), folder, seed=seed)


def build_internvl(
    folder: Path,
    *,
    tied: bool = False,
    seed: int = 9,
    text_type: str = "qwen3",
    vision: dict[str, Any] | None = None,
    **text: Any,
) -> Path:
    """An InternVL in HF format before a text model of `text_type`.

    Its tower has InternViT-300M's biases and layer norms; `vision={"use_qk_norm": True,
    "attention_bias": False, "norm_type": "rms_norm"}` gives InternViT-6B's.
    """
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    from tests.tiny.processors import TILE, save_internvl_processor

    tokenizer = save_internvl_processor(folder, seed=seed)
    fields = text_fields(text_type, tokenizer, **({"vocab_size": VOCAB_SIZE + 4} | text))
    tower = {"image_size": [TILE, TILE], "patch_size": [14, 14], "attention_bias": True}
    config = InternVLConfig(
        text_config=fields | {"model_type": text_type, "tie_word_embeddings": tied},
        vision_config=TOWER | tower | (vision or {}),
        image_seq_length=4,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        tie_word_embeddings=tied,
    )
    return _save(InternVLForConditionalGeneration(config), folder, seed=seed)


def build_llava(
    folder: Path, *, tied: bool = False, seed: int = 10, text_type: str = "llama", **text: Any
) -> Path:
    """A LLaVA: CLIP's tower, left before its last layer, before a text model of `text_type`."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    from tests.tiny.processors import CROP, save_llava_processor

    tokenizer = save_llava_processor(folder, seed=seed)
    fields = text_fields(text_type, tokenizer, **({"vocab_size": VOCAB_SIZE + 2} | text))
    config = LlavaConfig(
        text_config=fields | {"model_type": text_type, "tie_word_embeddings": tied},
        vision_config=TOWER | {"model_type": "clip_vision_model", "image_size": CROP},
        image_seq_length=9,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=tied,
    )
    return _save(LlavaForConditionalGeneration(config), folder, seed=seed)


def build_llava_onevision(
    folder: Path, *, tied: bool = False, seed: int = 11, text_type: str = "qwen2", **text: Any
) -> Path:
    """A LLaVA-OneVision: SigLIP's tower before a text model of `text_type`."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    from tests.tiny.processors import CROP, GRID_PINPOINTS, save_llava_onevision_processor

    tokenizer = save_llava_onevision_processor(folder, seed=seed)
    fields = text_fields(text_type, tokenizer, **({"vocab_size": VOCAB_SIZE + 2} | text))
    tower = {"model_type": "siglip_vision_model", "image_size": CROP, "vision_use_head": False}
    config = LlavaOnevisionConfig(
        text_config=fields | {"model_type": text_type, "tie_word_embeddings": tied},
        vision_config=TOWER | tower,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=GRID_PINPOINTS,
        tie_word_embeddings=tied,
    )
    return _save(LlavaOnevisionForConditionalGeneration(config), folder, seed=seed)


BUILDERS: dict[str, Callable[..., Path]] = {
    "qwen2": build_qwen2,
    "qwen3": build_qwen3,
    "qwen3_moe": build_qwen3_moe,
    "llama": build_llama,
    "qwen2_5_vl": build_qwen2_5_vl,
    "qwen3_vl": build_qwen3_vl,
    "qwen3_vl_moe": build_qwen3_vl_moe,
    "exaone4_5": build_exaone4_5,
    "internvl": build_internvl,
    "llava": build_llava,
    "llava_onevision": build_llava_onevision,
}


def text_fields(text_type: str, tokenizer: Any, **changes: Any) -> dict[str, Any]:
    """Text config fields of `text_type`; Qwen2's head dim is hidden / heads and no field."""
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    ids = {"bos_token_id": pad, "eos_token_id": end, "pad_token_id": pad}
    fields = TEXT | ids | (MOE if text_type == "qwen3_moe" else {}) | changes
    absent = {"head_dim"} if text_type == "qwen2" else set()
    return {key: value for key, value in fields.items() if key not in absent}


def _build_text(text_type: str, folder: Path, *, tied: bool, seed: int, **text: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.tiny.processors import save_tokenizer

    fields = text_fields(text_type, save_tokenizer(folder, seed=seed), **text)
    config = AutoConfig.for_model(text_type, **fields, tie_word_embeddings=tied)
    return _save(AutoModelForCausalLM.from_config(config), folder, seed=seed)


def _qwen3_vl_parts(text: dict[str, Any]) -> dict[str, Any]:
    text = text | {"rope_parameters": text["rope_parameters"] | MROPE}
    vision = VISION | {"out_hidden_size": text["hidden_size"]}
    return {"text_config": text, "vision_config": vision}


def _save_qwen2_5_processor(folder: Path, name: str, *, seed: int) -> Any:
    from tests.tiny.processors import save_qwen_processor

    return save_qwen_processor(
        folder,
        name,
        seed=seed,
        patch_size=WINDOWED_VISION["patch_size"],
        video_processor="Qwen2VLVideoProcessor",
    )


def _qwen_token_ids(tokenizer: Any) -> dict[str, int]:
    from tests.tiny.processors import QWEN_TOKENS

    return {field: tokenizer.convert_tokens_to_ids(name) for field, name in QWEN_TOKENS.items()}


def _save(model: Any, folder: Path, *, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 3:  # stacked experts and position embeddings: each row is its own
                weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
            elif weight.ndim > 1:
                weight.normal_(0.0, weight[0].numel() ** -0.5, generator=generator)
            elif name.endswith("bias"):
                weight.normal_(0.0, 0.2, generator=generator)
            else:
                weight.uniform_(0.5, 1.5, generator=generator)
    model.save_pretrained(folder)
    return folder
