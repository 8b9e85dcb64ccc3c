"""A family's decoder as Megatron-Core's GPTModel, with our layers in TransformerEngine's place."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from vlmcore.families import LanguageModel, MixtureOfExperts
from vlmcore.layout import Layout
from vlmcore.models.decoder import Decoder, DecoderBlock, DecoderLayer
from vlmcore.models.experts import GroupedExperts
from vlmcore.models.gated import SwiGLU
from vlmcore.models.layers import PackedAttention, PositionRotary, RMSNorm
from vlmcore.models.linear import ColumnLinear, RowLinear


def transformer_config(
    model: LanguageModel,
    layout: Layout,
    *,
    params_dtype: torch.dtype = torch.float32,
    **training: Any,
) -> TransformerConfig:
    """Megatron's config of a decoder; every fusion that needs TransformerEngine or Apex is off.

    Args:
        model: The decoder's shape.
        layout: How it lies over ranks.
        params_dtype: Dtype of the weights.
        training: Further fields of Megatron's config: recompute, losses of the router.
    """
    interleaved = layout.virtual_pipeline_model_parallel_size > 1
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        layernorm_epsilon=model.layernorm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        mrope_section=list(model.mrope_section),
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=(
            layout.virtual_pipeline_model_parallel_size if interleaved else None
        ),
        # without both, Megatron's interleaved schedule at pipeline size 2 runs and is wrong
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
        context_parallel_size=layout.context_parallel_size,
        sequence_parallel=layout.sequence_parallel,
        variable_seq_lengths=layout.pipeline_model_parallel_size > 1,  # packed rows differ
        params_dtype=params_dtype,
        pipeline_dtype=params_dtype,
        bf16=params_dtype is torch.bfloat16,
        fp16=params_dtype is torch.float16,
        calculate_per_token_loss=True,
        use_cpu_initialization=True,
        perform_initialization=False,  # every weight is loaded
        moe_token_dispatcher_type="alltoall",
        apply_rope_fusion=True,  # by vlmcore.models.layers
        bias_activation_fusion=False,
        use_te_activation_func=True,  # means the activation that `_layer_spec` names
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **((_experts_config(model.moe) if model.moe else {}) | training),
    )


def _experts_config(moe: MixtureOfExperts) -> dict[str, Any]:
    """Routing as Qwen3-MoE's in transformers 5.19: a softmax over all experts, then the top k.

    Where the chosen probabilities are then made to sum to one, that equals a softmax over the
    chosen logits alone, which is what Megatron computes without `moe_router_pre_softmax`.
    """
    return {
        "num_moe_experts": moe.num_experts,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_router_topk": moe.top_k,
        "moe_router_pre_softmax": not moe.norm_topk_prob,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
    }


def padded_vocab_size(vocab_size: int, *, tensor_model_parallel_size: int) -> int:
    """The vocabulary rounded up so that ranks hold equal parts; checkpoints stay unpadded."""
    step = tensor_model_parallel_size
    return -(-vocab_size // step) * step


def build_language_model(
    model: LanguageModel,
    config: TransformerConfig,
    *,
    virtual_stage: int | None = None,
    parallel_output: bool = True,
    scatter_embedding: bool = True,
) -> Decoder:
    """This rank's layers of the decoder, with uninitialised weights.

    Args:
        model: The decoder's shape.
        config: From `transformer_config`.
        virtual_stage: Which of the rank's chunks; None where stages are not interleaved.
        parallel_output: Leave logits split over the tensor parallel ranks.
        scatter_embedding: Split embeddings for sequence parallelism; a vision-language model does
            it itself, after it has placed the image features.
    """
    block = TransformerBlockSubmodules(
        layer_specs=[_layer_spec(model, config)] * get_num_layers_to_build(config, virtual_stage),
        layer_norm=RMSNorm,
    )
    ends = {"ignore_virtual": False, "vp_stage": virtual_stage}
    gpt = Decoder(
        config,
        block,
        vocab_size=padded_vocab_size(
            model.vocab_size, tensor_model_parallel_size=config.tensor_model_parallel_size
        ),
        max_sequence_length=model.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(**ends),
        post_process=parallel_state.is_pipeline_last_stage(**ends),
        position_embedding_type="mrope",
        share_embeddings_and_output_weights=model.tied_embeddings,
        scatter_embedding_sequence_parallel=scatter_embedding,
        parallel_output=parallel_output,
        vp_stage=virtual_stage,
    )
    gpt.rotary_pos_emb = PositionRotary(
        kv_channels=model.kv_channels,
        rope=model.rope,
        section=model.mrope_section,
        interleaved=model.mrope_interleaved,
    )
    gpt.decoder.__class__ = DecoderBlock  # GPTModel builds Megatron's own
    gpt.num_tokens_known = model.vocab_size
    _mark_split_weights(gpt)
    _mark_experts(gpt)
    if gpt.post_process and gpt.vocab_size > model.vocab_size:
        gpt.output_layer.register_forward_hook(partial(_mask_padding, model.vocab_size))
    return gpt


def _layer_spec(model: LanguageModel, config: TransformerConfig) -> ModuleSpec:
    """One decoder layer, with our layers in TransformerEngine's place."""
    if not moe_utils.HAVE_TE:
        # its router asks whether the name is None; ends when Megatron defines it without
        # TransformerEngine
        moe_utils.te_general_gemm = None
    layer = get_gpt_layer_local_spec(
        num_experts=model.moe.num_experts if model.moe else None,
        qk_layernorm=model.qk_layernorm,
        normalization="RMSNorm",
    )
    layer.module = DecoderLayer
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    attention.linear_qkv, attention.linear_proj = ColumnLinear, RowLinear
    if model.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    mlp = layer.submodules.mlp
    gated = mlp.submodules.experts if model.moe else mlp
    gated.submodules.activation_func = SwiGLU
    gated.submodules.linear_fc1, gated.submodules.linear_fc2 = ColumnLinear, RowLinear
    if model.moe:
        if config.moe_grouped_gemm:
            mlp.submodules.experts.module = GroupedExperts
        # the local spec would store it under the name of a fused linear layer that is not there;
        # TransformerEngine's spec, whose checkpoints others write, keeps its own
        names = layer.submodules.sharded_state_dict_keys_map
        layer.submodules.sharded_state_dict_keys_map = {
            ours: stored for ours, stored in names.items() if ours != "pre_mlp_layernorm."
        }
    return layer


def _mark_split_weights(gpt: GPTModel) -> None:
    """Marks what tensor parallel ranks hold in parts, as Megatron does while it initialises.

    The gradient norm leaves unmarked weights out on every rank but the first, as copies.
    """
    for module in gpt.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding):
            axis = 0
        elif isinstance(module, RowParallelLinear):
            axis = 1
        else:
            continue
        if module.weight is not None:  # a tied output layer borrows its weight
            set_tensor_model_parallel_attributes(module.weight, True, axis, 1)


def _mark_experts(gpt: GPTModel) -> None:
    """Has gradients of experts reduced over the ranks that hold the same part of the same ones.

    Megatron-Core 0.16 does so where experts are dealt out, but not where they are only cut, or
    whole beside a tensor parallel rest.
    """
    for module in gpt.modules():
        if getattr(module, "is_expert", False):
            for parameter in module.parameters(recurse=False):
                parameter.allreduce = False


def _mask_padding(
    vocab_size: int, _: nn.Module, __: Any, output: tuple[Tensor, Any]
) -> tuple[Tensor, Any]:
    """Keeps the rows that only pad the vocabulary out of the softmax: HF's model has none."""
    logits, bias = output
    width = logits.shape[-1]
    split = width < vocab_size  # else gathered from all ranks
    start = parallel_state.get_tensor_model_parallel_rank() * width if split else 0
    logits[..., max(vocab_size - start, 0) :] = torch.finfo(logits.dtype).min
    return logits, bias
