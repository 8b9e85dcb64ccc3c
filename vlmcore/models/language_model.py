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
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from vlmcore.errors import TrainError
from vlmcore.families import LanguageModel
from vlmcore.models.layers import PackedAttention, PositionRotary, RMSNorm


def transformer_config(
    model: LanguageModel,
    *,
    tensor_model_parallel_size: int = 1,
    sequence_parallel: bool = False,
    params_dtype: torch.dtype = torch.float32,
) -> TransformerConfig:
    """Megatron's config of a decoder; every fusion that needs TransformerEngine or Apex is off."""
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
        tensor_model_parallel_size=tensor_model_parallel_size,
        sequence_parallel=sequence_parallel,
        params_dtype=params_dtype,
        pipeline_dtype=params_dtype,
        bf16=params_dtype is torch.bfloat16,
        calculate_per_token_loss=True,
        use_cpu_initialization=True,
        perform_initialization=False,  # every weight is loaded
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )


def check_tensor_parallel(model: LanguageModel, size: int) -> None:
    """Refuses a tensor parallel size that cannot cut this decoder.

    Raises:
        TrainError: The size does not divide the kv heads, or the intermediate size.
    """
    for name, value in (
        ("num_attention_heads", model.num_attention_heads),
        ("num_key_value_heads", model.num_query_groups),
        ("intermediate_size", model.ffn_hidden_size),
    ):
        if value % size:
            raise TrainError(
                f"tensor_model_parallel_size {size} does not divide {name} {value} of the "
                f"language model; use a divisor of {value}"
            )


def padded_vocab_size(vocab_size: int, *, tensor_model_parallel_size: int) -> int:
    """The vocabulary rounded up so that ranks hold equal parts; checkpoints stay unpadded."""
    step = tensor_model_parallel_size
    return -(-vocab_size // step) * step


def build_language_model(
    model: LanguageModel,
    config: TransformerConfig,
    *,
    parallel_output: bool = True,
    scatter_embedding: bool = True,
) -> GPTModel:
    """The decoder with uninitialised weights on this rank.

    Args:
        model: The decoder's shape.
        config: From `transformer_config`.
        parallel_output: Leave logits split over the tensor parallel ranks.
        scatter_embedding: Split embeddings for sequence parallelism; a vision-language model does
            it itself, after it has placed the image features.

    Raises:
        TrainError: The tensor parallel size does not divide the heads.
    """
    check_tensor_parallel(model, config.tensor_model_parallel_size)
    layer = get_gpt_layer_local_spec(qk_layernorm=model.qk_layernorm, normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if model.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    block = TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm
    )
    gpt = GPTModel(
        config,
        block,
        vocab_size=padded_vocab_size(
            model.vocab_size, tensor_model_parallel_size=config.tensor_model_parallel_size
        ),
        max_sequence_length=model.max_position_embeddings,
        position_embedding_type="mrope",
        rotary_base=model.rotary_base,
        share_embeddings_and_output_weights=model.tied_embeddings,
        scatter_embedding_sequence_parallel=scatter_embedding,
        parallel_output=parallel_output,
    )
    gpt.rotary_pos_emb = PositionRotary(
        kv_channels=model.kv_channels,
        rotary_base=model.rotary_base,
        section=model.mrope_section,
        interleaved=model.mrope_interleaved,
    )
    _mark_split_weights(gpt)
    if gpt.vocab_size > model.vocab_size:
        gpt.output_layer.register_forward_hook(partial(_mask_padding, model.vocab_size))
    return gpt


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
