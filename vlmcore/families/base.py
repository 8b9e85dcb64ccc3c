"""What a family file says: a weight map, freeze groups, the language model's shape, token names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vlmcore.families.rows import Row

Config = Mapping[str, Any]  # an HF config.json as read from disk
FreezeGroup = Literal["vit", "aligner", "llm"]

TEXT_PREFIX = "model.language_model."  # of a vision-language model's decoder, in memory
HEAD = "lm_head."


@dataclass(frozen=True, kw_only=True)
class MixtureOfExperts:
    """The experts of every layer; top-k routing with a softmax over all experts."""

    num_experts: int
    top_k: int
    ffn_hidden_size: int
    norm_topk_prob: bool


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """Shape of the decoder in Megatron-Core's argument names.

    Attributes:
        rope: HF's rope_parameters: `rope_type` (default or llama3), `rope_theta` and what the type
            needs.
        mrope_section: Rotary frequency pairs for the temporal, height and width positions; sums to
            kv_channels / 2. A text-only model gives all of them to one position.
        moe: None for a dense model.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    layernorm_epsilon: float
    rope: Mapping[str, Any]
    mrope_section: tuple[int, int, int]
    mrope_interleaved: bool
    add_qkv_bias: bool
    qk_layernorm: bool
    tied_embeddings: bool
    max_position_embeddings: int
    moe: MixtureOfExperts | None = None


@dataclass(frozen=True, kw_only=True)
class Vision:
    """How images and videos enter the text, by token names: ids come from the tokenizer.

    Attributes:
        tokens: Config field → name of the token whose id it holds.
        image_token: The placeholder that is repeated once per image feature.
        video_token: Likewise for video; None where the family takes none, or takes its frames as
            images.
        mrope: True where positions are (temporal, height, width) triples.
        pixel_limits: Those of a stage that its processor can keep; the others make every image, or
            every frame, the same size.
    """

    tokens: Mapping[str, str]
    image_token: str
    video_token: str | None
    mrope: bool
    pixel_limits: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family.

    Attributes:
        model_type: `model_type` of the HF config.
        architecture: Name of the transformers class that holds it.
        rows: HF config → the weight map.
        language_model: HF config → shape of the decoder.
        groups: Freeze group → HF key prefixes; the longest matching prefix decides.
        vision: Facts about the vision side; None for a text-only family.
        disk_prefixes: (prefix on disk, prefix in memory) where published checkpoints use other
            names than transformers does in memory; the first that matches decides.
        input_first_experts: True where published checkpoints hold fused experts input dimension
            first.
        vllm_model_impl: What vLLM's `--model-impl` has to be where its own class would build
            another model; None: its own class is right.
    """

    model_type: str
    architecture: str
    rows: Callable[[Config], tuple[Row, ...]]
    language_model: Callable[[Config], LanguageModel]
    groups: Mapping[FreezeGroup, tuple[str, ...]]
    vision: Vision | None = None
    disk_prefixes: tuple[tuple[str, str], ...] = ()
    input_first_experts: bool = field(default=False)
    vllm_model_impl: str | None = None

    @property
    def text_hf_prefix(self) -> str:
        """HF prefix of the decoder's keys, `lm_head` aside."""
        return "model." if self.vision is None else TEXT_PREFIX

    @property
    def mcore_prefix(self) -> str:
        """Prefix of the decoder's keys in torch_dist."""
        return "" if self.vision is None else "language_model."

    def memory_key(self, key: str) -> str:
        """A key of a checkpoint, in whichever form it was saved, as transformers holds it."""
        for disk, memory in self.disk_prefixes:
            if key.startswith(disk):
                return memory + key.removeprefix(disk)
        return key

    def disk_key(self, key: str) -> str:
        """The key that published checkpoints of this family use for a key in memory."""
        for disk, memory in self.disk_prefixes:
            if key.startswith(memory):
                return disk + key.removeprefix(memory)
        return key

    def group_of(self, hf_key: str) -> FreezeGroup:
        """The freeze group of a key in memory.

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
