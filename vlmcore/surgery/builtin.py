"""Tiny donors that are built here: a Qwen3-VL and a Qwen3 of another width and depth.

Both share one byte-level tokenizer with Qwen's special tokens, in which every digit is one token,
and a chat template that renders text alike in both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip

TEXTS = ["user\n", "assistant\n", "Read the number."] * 2

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content -%}
{%- if part.type in ('image', 'image_url') -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' -%}
<|vision_start|><|video_pad|><|vision_end|>
{%- elif part.type == 'text' -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""

VOCAB_SIZE = 320
PATCH_SIZE, MERGE_SIZE = 16, 2


def build_tokenizer(texts: Sequence[str], *, vocab_size: int) -> Any:
    """A byte-level tokenizer trained on a few texts, each digit one token, with Qwen's template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        additional_special_tokens=list(SPECIAL_TOKENS),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def _text_shape(**values: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        **values,
    }


def build_tiny_qwen3(target: Path, *, seed: int) -> None:
    """A random Qwen3 of 1.4 M parameters: 192 wide, 4 layers, 6 heads over 2 kv heads."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = build_tokenizer(TEXTS, vocab_size=VOCAB_SIZE)
    config = Qwen3Config(
        **_text_shape(
            hidden_size=192,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
        ),
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        **_token_ids(tokenizer),
    )
    torch.manual_seed(seed)
    _save(Qwen3ForCausalLM(config), tokenizer, target)


def build_tiny_qwen3_vl(target: Path, *, seed: int) -> None:
    """A random Qwen3-VL of 0.5 M parameters: text 128 wide and 2 layers, ViT 64 wide and 4 layers.

    One merged image token covers 32 × 32 pixels; deepstack features leave ViT layers 1 and 2.
    """
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tokenizer = build_tokenizer(TEXTS, vocab_size=VOCAB_SIZE)
    config = Qwen3VLConfig(
        text_config={
            **_text_shape(
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
            ),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            **_token_ids(tokenizer),
        },
        vision_config={
            "depth": 4,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 128,
            "deepstack_visual_indexes": [1, 2],
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "num_position_embeddings": 256,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    _save(Qwen3VLForConditionalGeneration(config), tokenizer, target)
    _write_processor_files(target)


def _token_ids(tokenizer: Any) -> dict[str, Any]:
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    return {"bos_token_id": pad, "eos_token_id": end, "pad_token_id": pad}


def _save(model: Any, tokenizer: Any, target: Path) -> None:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar for a few kilobytes says nothing beside our own
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _write_processor_files(target: Path) -> None:
    common = {
        "patch_size": PATCH_SIZE,
        "temporal_patch_size": 2,
        "merge_size": MERGE_SIZE,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"shortest_edge": 32 * 32, "longest_edge": 512 * 512},
        "processor_class": "Qwen3VLProcessor",
    }
    files: Mapping[str, Mapping[str, Any]] = {
        "preprocessor_config.json": {**common, "image_processor_type": "Qwen2VLImageProcessor"},
        "video_preprocessor_config.json": {
            **common,
            "video_processor_type": "Qwen3VLVideoProcessor",
        },
    }
    for name, content in files.items():
        (target / name).write_text(json.dumps(content, indent=2) + "\n")


BUILTIN_DONORS: Mapping[str, Callable[..., None]] = {
    "tiny-qwen3": build_tiny_qwen3,
    "tiny-qwen3-vl": build_tiny_qwen3_vl,
}
