"""A vision-language model for Megatron-Core: transformers' vision modules before a GPTModel.

The vision side is replicated on every tensor parallel rank of the first pipeline stage, so its
weights are copied verbatim. Its features replace the embeddings of the placeholders; deepstack
features (Qwen3-VL) are added to the hidden states after the first decoder layers.

Shape suffixes: B rows, S tokens of a row, H hidden, F image features (merged patches) of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from vlmcore.models.vision import Features, Placeholders, see


class VisionLanguageModel(MegatronModule):
    """Vision side and decoder, as far as they stand on this rank.

    Args:
        config: The decoder's config.
        language_model: A GPTModel built with `scatter_embedding=False`.
        vision_model: From `build_vision_model`; None beyond the first pipeline stage.
        placeholders: Token ids that the features replace.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        language_model: GPTModel,
        vision_model: nn.Module | None,
        placeholders: Placeholders,
    ) -> None:
        super().__init__(config)
        self.model_type = language_model.model_type  # the schedules ask for it
        self.language_model = language_model
        self.vision_model = vision_model
        self.placeholders = placeholders
        self._deepstack_SBH: Sequence[Tensor] = ()
        if vision_model is not None:
            for depth, layer in enumerate(language_model.decoder.layers):
                layer.register_forward_hook(self._deepstack_hook(depth))

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Hands on what the pipeline schedule received."""
        self.language_model.set_input_tensor(input_tensor)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **vision_inputs: Any,
    ) -> Tensor:
        """Per-token losses [B, S] where labels are given, else logits [B, S, vocabulary].

        Before the last pipeline stage: hidden states [S, B, H].

        Args:
            input_ids: [B, S].
            position_ids: [3, B, S].
            attention_mask: Unused; attention is causal.
            labels: [B, S], already shifted.
            packed_seq_params: Where samples begin, with B = 1.
            vision_inputs: What the processor returns for the images and videos of all rows, in
                order: `pixel_values`, `image_grid_thw`, `pixel_values_videos` …

        Raises:
            ValueError: The placeholders do not match the features.
        """
        embedded_SBH = None
        if self.vision_model is not None:
            embedded_SBH = self._embed(input_ids, vision_inputs)
        out: Tensor = self.language_model(
            input_ids,
            position_ids,
            attention_mask,
            decoder_input=embedded_SBH,
            labels=labels,
            packed_seq_params=packed_seq_params,
        )
        self._deepstack_SBH = ()
        return out

    def _embed(self, input_ids: Tensor, vision_inputs: dict[str, Any]) -> Tensor:
        embedded_SBH = self.language_model.embedding(input_ids, None)
        deepstack: dict[int, Tensor] = {}
        for seen in see(
            self.vision_model, vision_inputs, self.placeholders, dtype=self.config.params_dtype
        ):
            is_seen_BS = _marked(input_ids, seen)
            embedded_SBH = _place(embedded_SBH, is_seen_BS, seen.embedded)
            for depth, features_FH in enumerate(seen.deepstack):
                level_SBH = deepstack.get(depth, torch.zeros_like(embedded_SBH))
                deepstack[depth] = _place(level_SBH, is_seen_BS, features_FH)
        levels = [deepstack[depth] for depth in range(len(deepstack))]
        if self.config.sequence_parallel:
            embedded_SBH = scatter_to_sequence_parallel_region(embedded_SBH)
            levels = [scatter_to_sequence_parallel_region(level) for level in levels]
        self._deepstack_SBH = levels
        return embedded_SBH

    def _deepstack_hook(self, depth: int) -> Any:
        def add(_: nn.Module, __: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any] | None:
            if depth >= len(self._deepstack_SBH):
                return None
            hidden_SBH, context = output
            return hidden_SBH + self._deepstack_SBH[depth], context

        return add


def _marked(input_ids: Tensor, seen: Features) -> Tensor:
    """Where the features belong, [B, S]."""
    is_seen_BS = input_ids == seen.token_id
    count = int(is_seen_BS.sum())
    if count != len(seen.embedded):
        raise ValueError(
            f"{count} placeholders (token {seen.token_id}), but {len(seen.embedded)} image "
            f"features; the processor that expanded them does not belong to this model"
        )
    return is_seen_BS


def _place(base_SBH: Tensor, is_seen_BS: Tensor, features_FH: Tensor) -> Tensor:
    """`base` with the features at the marked positions; the gradient reaches both."""
    base_BSH = base_SBH.transpose(0, 1)
    placed = base_BSH.masked_scatter(is_seen_BS[..., None], features_FH.to(base_BSH.dtype))
    return placed.transpose(0, 1).contiguous()
