"""Qwen3-VL, dense: Qwen3 decoder with interleaved M-RoPE, a ViT with deepstack mergers."""

from vlmcore.families.base import Config, Family, LanguageModel, Vision
from vlmcore.families.decoder import decoder_rows, language_model
from vlmcore.families.rows import Subtree


def _language_model(config: Config) -> LanguageModel:
    # tie_word_embeddings is read at the top level: the text config's copy is a default
    return language_model(
        config["text_config"],
        tied=bool(config.get("tie_word_embeddings", False)),
        qk_layernorm=True,
    )


FAMILY = Family(
    model_type="qwen3_vl",
    architecture="Qwen3VLForConditionalGeneration",
    rows=(
        Subtree("model.visual.", "vision_model."),
        *decoder_rows(hf="model.language_model.", mcore="language_model.", qk_norm=True),
    ),
    groups={
        "vit": ("model.visual.",),
        "aligner": ("model.visual.merger.", "model.visual.deepstack_merger_list."),
        "llm": ("model.language_model.", "lm_head."),
    },
    language_model=_language_model,
    vision=Vision(
        hf_prefix="model.visual.",
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        mrope=True,
    ),
    text_hf_prefix="model.language_model.",
    mcore_prefix="language_model.",
)
