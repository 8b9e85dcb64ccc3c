"""A text-only family from its decoder."""

from vlmcore.families.base import Family
from vlmcore.families.decoder import Decoder


def text_family(model_type: str, *, architecture: str, decoder: Decoder) -> Family:
    """The family whose whole model is one decoder."""
    rows = decoder.rows(hf="model.", mcore="")
    return Family(
        model_type=model_type,
        architecture=architecture,
        rows=lambda _: rows,
        language_model=decoder.language_model,
        groups={"llm": ("model.", "lm_head.")},
    )
