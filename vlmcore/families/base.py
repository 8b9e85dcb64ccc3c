"""What a family file says: a weight map, freeze groups, the language model's shape, token names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vlmcore.families.rows import Row

Config = Mapping[str, Any]  # an HF config.json as read from disk
FreezeGroup = Literal["vit", "aligner", "llm"]


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """Shape of the decoder in Megatron-Core's argument names.

    `mrope_section` counts rotary frequency pairs for the temporal, height and width positions and
    sums to kv_channels / 2; a text-only model gives all of them to one position.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    layernorm_epsilon: float
    rotary_base: float
    mrope_section: tuple[int, int, int]
    mrope_interleaved: bool
    add_qkv_bias: bool
    qk_layernorm: bool
    tied_embeddings: bool
    max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class Vision:
    """How images enter the text: token names (ids come from the tokenizer) and the module's name.

    Attributes:
        hf_prefix: Prefix of the vision tower's HF keys; the same tree stands under
            `vision_model.` in the Megatron model.
        image_token: The placeholder that is repeated once per merged patch.
        mrope: True where positions are (temporal, height, width) triples.
    """

    hf_prefix: str
    image_token: str
    video_token: str
    vision_start_token: str
    vision_end_token: str
    mrope: bool


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family.

    Attributes:
        model_type: `model_type` of the HF config.
        architecture: Name of the transformers class that holds it.
        rows: The weight map.
        groups: Freeze group → HF key prefixes; the longest matching prefix decides.
        language_model: HF config → shape of the decoder.
        vision: Facts about the vision side; None for a text-only family.
        text_hf_prefix: HF prefix of the decoder's keys, `lm_head` aside.
        mcore_prefix: Prefix of the decoder's keys in torch_dist.
    """

    model_type: str
    architecture: str
    rows: tuple[Row, ...]
    groups: Mapping[FreezeGroup, tuple[str, ...]]
    language_model: Callable[[Config], LanguageModel]
    vision: Vision | None
    text_hf_prefix: str
    mcore_prefix: str

    def group_of(self, hf_key: str) -> FreezeGroup:
        """The freeze group of an HF key.

        Raises:
            ValueError: No group covers the key, or two of them claim it with the same prefix.
        """
        claims = sorted(
            ((len(p), g) for g, prefixes in self.groups.items() for p in prefixes
             if hf_key.startswith(p)),
            reverse=True,
        )  # fmt: skip
        if not claims:
            raise ValueError(
                f"{self.model_type}: {hf_key} belongs to no freeze group; "
                f"add its prefix to `groups` in the family file"
            )
        if len(claims) > 1 and claims[0][0] == claims[1][0] and claims[0][1] != claims[1][1]:
            raise ValueError(
                f"{self.model_type}: {hf_key} is claimed by both {claims[0][1]} and {claims[1][1]}"
            )
        return claims[0][1]
