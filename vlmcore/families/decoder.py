"""The part that Qwen- and Llama-style decoders share: weight rows and the reading of a text config.

Megatron-Core's local layer spec calls the norms `input_layernorm` and `pre_mlp_layernorm`, but
`sharded_state_dict` stores them under TransformerEngine's fused names (Megatron-Core 0.16).
"""

from vlmcore.families.base import Config, LanguageModel
from vlmcore.families.rows import FuseGateUp, FuseQKV, Rename, Row, Tied


def decoder_rows(*, hf: str, mcore: str, qkv_bias: bool = False, qk_norm: bool = False) -> tuple[
    Row, ...
]:  # fmt: skip
    """Rows of a dense decoder with gated MLP and grouped-query attention.

    Args:
        hf: HF prefix up to and without `layers`, such as `model.language_model.`.
        mcore: Megatron prefix, `language_model.` in a vision-language model, else empty.
        qkv_bias: Whether q, k and v carry a bias.
        qk_norm: Whether q and k are normalised per head.
    """
    layer, stack = f"{hf}layers.{{layer}}.", f"{mcore}decoder.layers."
    attention = f"{layer}self_attn."

    def fused(suffix: str) -> FuseQKV:
        return FuseQKV(
            q=f"{attention}q_proj.{suffix}",
            k=f"{attention}k_proj.{suffix}",
            v=f"{attention}v_proj.{suffix}",
            mcore=f"{stack}self_attention.linear_qkv.{suffix}",
        )

    rows: list[Row] = [
        Rename(f"{hf}embed_tokens.weight", f"{mcore}embedding.word_embeddings.weight"),
        Rename(
            f"{layer}input_layernorm.weight", f"{stack}self_attention.linear_qkv.layer_norm_weight"
        ),
        fused("weight"),
        Rename(f"{attention}o_proj.weight", f"{stack}self_attention.linear_proj.weight"),
        Rename(
            f"{layer}post_attention_layernorm.weight", f"{stack}mlp.linear_fc1.layer_norm_weight"
        ),
        FuseGateUp(
            gate=f"{layer}mlp.gate_proj.weight",
            up=f"{layer}mlp.up_proj.weight",
            mcore=f"{stack}mlp.linear_fc1.weight",
        ),
        Rename(f"{layer}mlp.down_proj.weight", f"{stack}mlp.linear_fc2.weight"),
        Rename(f"{hf}norm.weight", f"{mcore}decoder.final_layernorm.weight"),
        Tied("lm_head.weight", to=f"{hf}embed_tokens.weight"),
        Rename("lm_head.weight", f"{mcore}output_layer.weight"),
    ]
    if qkv_bias:
        rows.append(fused("bias"))
    if qk_norm:
        rows += [
            Rename(f"{attention}{x}_norm.weight", f"{stack}self_attention.{x}_layernorm.weight")
            for x in "qk"
        ]
    return tuple(rows)


def language_model(
    text: Config, *, tied: bool, add_qkv_bias: bool = False, qk_layernorm: bool = False
) -> LanguageModel:
    """The decoder's shape from an HF text config.

    `rope_theta` sits in `rope_parameters` in configs of transformers 5, at the top level before.
    """
    heads = text["num_attention_heads"]
    head_dim = text.get("head_dim") or text["hidden_size"] // heads
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    theta = rope.get("rope_theta", text.get("rope_theta"))
    if theta is None:
        raise ValueError(
            "the text config has rope_theta neither in rope_parameters nor at its top level"
        )
    section = rope.get("mrope_section")
    return LanguageModel(
        num_layers=text["num_hidden_layers"],
        hidden_size=text["hidden_size"],
        ffn_hidden_size=text["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=text["num_key_value_heads"],
        kv_channels=head_dim,
        vocab_size=text["vocab_size"],
        layernorm_epsilon=text["rms_norm_eps"],
        rotary_base=float(theta),
        mrope_section=tuple(section) if section else (head_dim // 2, 0, 0),
        mrope_interleaved=bool(rope.get("mrope_interleaved", False)),
        add_qkv_bias=add_qkv_bias,
        qk_layernorm=qk_layernorm,
        tied_embeddings=tied,
        max_position_embeddings=text["max_position_embeddings"],
    )
