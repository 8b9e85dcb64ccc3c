"""A tiny Qwen3-VL with random weights, tokenizer, processor, chat template: ready to be served."""

import json
from pathlib import Path

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if 'image' in c or c.type in ('image', 'image_url') %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MEAN_STD = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def build(folder: Path) -> Path:
    """Write the model into `folder`; the same weights every time. 32 px make one image token."""
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_tokenizer(),
        additional_special_tokens=SPECIAL_TOKENS,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 2048,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [0, 1],
            "patch_size": 16,
            "spatial_merge_size": 2,
            "num_position_embeddings": 256,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(0)
    Qwen3VLForConditionalGeneration(config).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write_processors(folder)
    return folder


def _byte_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, special_tokens=[])
    tokenizer.train_from_iterator(["Read the number."] * 10, trainer)
    return tokenizer


def _write_processors(folder: Path) -> None:
    sizes = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
    pixels = {"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 16}
    image = {"image_processor_type": "Qwen2VLImageProcessorFast", "size": pixels}
    video = {"video_processor_type": "Qwen3VLVideoProcessor", "size": pixels}
    for name, values in {"preprocessor": image, "video_preprocessor": video}.items():
        text = json.dumps({**values, **sizes, **MEAN_STD, "processor_class": "Qwen3VLProcessor"})
        (folder / f"{name}_config.json").write_text(text)
