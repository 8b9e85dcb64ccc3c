"""The decoders that language models share: weight rows, and the reading of a text config.

Layout facts (megatron-core 0.16): the local layer spec calls the norms `input_layernorm` and
`pre_mlp_layernorm`, but `sharded_state_dict` stores them under TransformerEngine's fused names,
except the norm before experts, which keeps its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlmcore.errors import WeightError
from vlmcore.families.base import Config, LanguageModel, MixtureOfExperts
from vlmcore.families.rows import Drop, FuseGateUp, FuseQKV, Rename, Row, StackExperts, Tied

_FIELDS = {
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "rms_norm_eps", "max_position_embeddings",
}  # fmt: skip
_MOE_FIELDS = {"num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"}
_ROPE_TYPES = {"default", "mrope", "llama3"}


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """What tells one Qwen- or Llama-style decoder from another.

    Attributes:
        qkv_bias: q, k and v carry a bias.
        qk_norm: q and k are normalised per head.
        own_head_dim: The head dim is a field of its own, not hidden_size / num_attention_heads.
        moe: The MLPs are mixtures of experts.
    """

    qkv_bias: bool = False
    qk_norm: bool = False
    own_head_dim: bool = False
    moe: bool = False

    def rows(self, *, hf: str, mcore: str) -> tuple[Row, ...]:
        """The weight map.

        Args:
            hf: HF prefix up to and without `layers`, such as `model.language_model.`.
            mcore: Megatron prefix, `language_model.` in a vision-language model, else empty.
        """
        layer, stack = f"{hf}layers.{{layer}}.", f"{mcore}decoder.layers."
        return (
            Rename(f"{hf}embed_tokens.weight", f"{mcore}embedding.word_embeddings.weight"),
            *self._attention_rows(layer, stack),
            *(_moe_rows(layer, stack) if self.moe else _mlp_rows(layer, stack)),
            Rename(f"{hf}norm.weight", f"{mcore}decoder.final_layernorm.weight"),
            Tied("lm_head.weight", to=f"{hf}embed_tokens.weight"),
            Rename("lm_head.weight", f"{mcore}output_layer.weight"),
        )

    def _attention_rows(self, layer: str, stack: str) -> list[Row]:
        hf, mcore = f"{layer}self_attn.", f"{stack}self_attention."

        def fused(part: str) -> FuseQKV:
            q, k, v = (f"{hf}{x}_proj.{part}" for x in "qkv")
            return FuseQKV(q=q, k=k, v=v, mcore=f"{mcore}linear_qkv.{part}")

        rows: list[Row] = [
            Rename(f"{layer}input_layernorm.weight", f"{mcore}linear_qkv.layer_norm_weight"),
            fused("weight"),
            Rename(f"{hf}o_proj.weight", f"{mcore}linear_proj.weight"),
        ]
        inverse_frequencies = f"{hf}rotary_emb.inv_freq"  # old Llama checkpoints hold them
        rows.append(Drop(inverse_frequencies, reason="computed from rope_theta"))
        if self.qkv_bias:
            rows.append(fused("bias"))
        if self.qk_norm:
            rows += [Rename(f"{hf}{x}_norm.weight", f"{mcore}{x}_layernorm.weight") for x in "qk"]
        return rows

    def language_model(self, config: Config) -> LanguageModel:
        """The decoder's shape from the config of the whole model.

        Raises:
            WeightError: The config asks for something that the Megatron model does not compute.
        """
        whole, text = self._completed(config)
        _check_supported(text)
        heads = text["num_attention_heads"]
        head_dim = text.get("head_dim") or text["hidden_size"] // heads
        rope = _rope(text)
        section = rope.pop("mrope_section", None) or (head_dim // 2, 0, 0)
        interleaved = bool(rope.pop("mrope_interleaved", False))
        return LanguageModel(
            num_layers=text["num_hidden_layers"],
            hidden_size=text["hidden_size"],
            ffn_hidden_size=text["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=text["num_key_value_heads"],
            kv_channels=head_dim,
            vocab_size=text["vocab_size"],
            layernorm_epsilon=text["rms_norm_eps"],
            rope=rope,
            mrope_section=tuple(section),
            mrope_interleaved=interleaved,
            add_qkv_bias=self.qkv_bias,
            qk_layernorm=self.qk_norm,
            # read at the top level: the text config's copy is a default
            tied_embeddings=bool(whole["tie_word_embeddings"]),
            max_position_embeddings=text["max_position_embeddings"],
            moe=_experts(text) if self.moe else None,
        )

    def _completed(self, config: Config) -> tuple[Config, Config]:
        """The config and its text part; what the file leaves out comes from transformers' class."""
        needed = _FIELDS | (_MOE_FIELDS if self.moe else set())
        needed |= {"head_dim"} if self.own_head_dim else set()
        whole, text = config, text_part(config)
        stated = "tie_word_embeddings" in whole and _states_rope(text)
        if needed - set(text) or not stated:
            from transformers import CONFIG_MAPPING

            whole = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).to_dict()
            text = text_part(whole)
        return whole, text


DECODERS = {
    "llama": Decoder(),
    "qwen2": Decoder(qkv_bias=True),
    "qwen3": Decoder(qk_norm=True, own_head_dim=True),
    "qwen3_moe": Decoder(qk_norm=True, own_head_dim=True, moe=True),
}


def text_part(config: Config) -> Config:
    """The text config; older files of vision-language models keep its fields at the top level."""
    part: Config = config.get("text_config") or config
    return part


def text_decoder(config: Config) -> Decoder:
    """The decoder inside a shell that takes any, by the model type of its text config.

    Raises:
        WeightError: No decoder is known by that name.
    """
    found = text_part(config).get("model_type")
    if found not in DECODERS:
        raise WeightError(
            f"{config.get('model_type')}: text_config.model_type is {found!r}, expected one of "
            f"{', '.join(sorted(DECODERS))}"
        )
    return DECODERS[found]


def _mlp_rows(layer: str, stack: str) -> list[Row]:
    norm = f"{layer}post_attention_layernorm.weight"
    return [
        Rename(norm, f"{stack}mlp.linear_fc1.layer_norm_weight"),
        FuseGateUp(
            gate=f"{layer}mlp.gate_proj.weight",
            up=f"{layer}mlp.up_proj.weight",
            mcore=f"{stack}mlp.linear_fc1.weight",
        ),
        Rename(f"{layer}mlp.down_proj.weight", f"{stack}mlp.linear_fc2.weight"),
    ]


def _moe_rows(layer: str, stack: str) -> list[Row]:
    return [
        Rename(f"{layer}post_attention_layernorm.weight", f"{stack}pre_mlp_layernorm.weight"),
        Rename(f"{layer}mlp.gate.weight", f"{stack}mlp.router.weight"),
        StackExperts(f"{layer}mlp.experts.", f"{stack}mlp.experts.experts."),
    ]


def _states_rope(text: Config) -> bool:
    return "rope_theta" in text or "rope_theta" in (text.get("rope_parameters") or {})


def _rope(text: Config) -> dict[str, Any]:
    """HF's rope_parameters; configs before transformers 5 spread them over two fields."""
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    rope.setdefault("rope_theta", text.get("rope_theta"))
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    if kind not in _ROPE_TYPES:
        raise WeightError(
            f"rope_type {kind!r} is not computed by the Megatron model; expected one of "
            f"{', '.join(sorted(_ROPE_TYPES))}"
        )
    return rope | {"rope_type": "default" if kind == "mrope" else kind}


def _experts(text: Config) -> MixtureOfExperts:
    return MixtureOfExperts(
        # transformers 5 writes the second name
        num_experts=text.get("num_experts") or text["num_local_experts"],
        top_k=text["num_experts_per_tok"],
        ffn_hidden_size=text["moe_intermediate_size"],
        norm_topk_prob=bool(text["norm_topk_prob"]),
    )


def _check_supported(text: Config) -> None:
    expected = {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "use_sliding_window": (False,),
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([], None),
    }
    faults = [
        f"{name} is {text[name]!r}, expected {values[0]!r}"
        for name, values in expected.items()
        if name in text and text[name] not in values
    ]
    if faults:
        raise WeightError(
            f"the text config of this {text.get('model_type')} asks for what the Megatron model "
            f"does not compute: {'; '.join(faults)}"
        )
