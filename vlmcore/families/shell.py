"""A vision-language family: a vision side, verbatim, and a decoder.

Everything under `model.` that is no part of the decoder stands below `vision_model.` in Megatron
with its own name: the Megatron model runs the transformers modules themselves.
"""

from collections.abc import Callable, Mapping

from vlmcore.families.base import HEAD, TEXT_PREFIX, Config, Family, Vision
from vlmcore.families.decoder import Decoder
from vlmcore.families.rows import Rename, Row, Subtree

VISION_PREFIX = "vision_model."  # in Megatron


def shell_family(
    model_type: str,
    *,
    architecture: str,
    vit: str,
    aligner: tuple[str, ...],
    decoder: Callable[[Config], Decoder],
    vision: Vision,
    disk_prefixes: Mapping[str, str] | None = None,
    input_first_experts: bool = False,
    vllm_model_impl: str | None = None,
) -> Family:
    """The family of a vision-language model.

    Args:
        model_type: `model_type` of the HF config.
        architecture: Name of the transformers class.
        vit: HF prefix of the vision tower, in memory.
        aligner: HF keys or prefixes of what stands between the tower and the decoder.
        decoder: HF config → its decoder.
        vision: Tokens and positions.
        disk_prefixes: Prefix on disk → prefix in memory.
        input_first_experts: See `Family`.
        vllm_model_impl: Likewise.
    """

    def rows(config: Config) -> tuple[Row, ...]:
        return (
            *(_verbatim(place) for place in (vit, *aligner) if not _inside(place, vit)),
            *decoder(config).rows(hf=TEXT_PREFIX, mcore="language_model."),
        )

    return Family(
        model_type=model_type,
        architecture=architecture,
        rows=rows,
        language_model=lambda config: decoder(config).language_model(config),
        groups={"vit": (vit,), "aligner": aligner, "llm": (TEXT_PREFIX, HEAD)},
        vision=vision,
        disk_prefixes=tuple((disk_prefixes or {}).items()),
        input_first_experts=input_first_experts,
        vllm_model_impl=vllm_model_impl,
    )


def _inside(place: str, vit: str) -> bool:
    return place != vit and place.startswith(vit)


def _verbatim(place: str) -> Row:
    mcore = VISION_PREFIX + place.removeprefix("model.")
    return Subtree(place, mcore) if place.endswith(".") else Rename(place, mcore)
