"""Qwen3, dense, text only: no biases, q and k normalised per head."""

from vlmcore.families.base import Config, Family, LanguageModel
from vlmcore.families.decoder import decoder_rows, language_model


def _language_model(config: Config) -> LanguageModel:
    return language_model(
        config, tied=bool(config.get("tie_word_embeddings", False)), qk_layernorm=True
    )


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    rows=decoder_rows(hf="model.", mcore="", qk_norm=True),
    groups={"llm": ("model.", "lm_head.")},
    language_model=_language_model,
    vision=None,
    text_hf_prefix="model.",
    mcore_prefix="",
)
