"""A vision-language model for Megatron-Core: the HF vision tower in front of a GPTModel.

The tower is the transformers module itself, replicated on every tensor parallel rank, so its
weights are copied verbatim. Its features replace the embeddings of the image placeholders;
deepstack features (Qwen3-VL) are added to the hidden states after the first decoder layers.

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


class VisionLanguageModel(MegatronModule):
    """Vision tower and decoder; forward takes what GPTModel takes, plus pixels.

    Args:
        config: The decoder's config.
        language_model: A GPTModel built with `scatter_embedding=False`.
        vision_model: The transformers vision tower, merger included.
        image_token_id: Id of the placeholder, from the tokenizer.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        language_model: GPTModel,
        vision_model: nn.Module,
        image_token_id: int,
    ) -> None:
        super().__init__(config)
        self.model_type = language_model.model_type  # the schedules ask for it
        self.language_model = language_model
        self.vision_model = vision_model
        self.image_token_id = image_token_id
        self._deepstack_SBH: Sequence[Tensor] = ()
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
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
    ) -> Tensor:
        """Per-token losses [B, S] where labels are given, else logits [B, S, vocabulary].

        Args:
            input_ids: [B, S].
            position_ids: [3, B, S].
            attention_mask: Unused; attention is causal.
            labels: [B, S], already shifted.
            packed_seq_params: Where samples begin, with B = 1.
            pixel_values: Patches as the processor gives them, images of all rows in order.
            image_grid_thw: [images, 3], patches of each image over time, height and width.
        """
        embedded_SBH = self.language_model.embedding(input_ids, None)
        deepstack: Sequence[Tensor] = ()
        if pixel_values is not None:
            features_FH, deepstack = self._see(pixel_values, image_grid_thw)
            is_image_BS = input_ids == self.image_token_id
            if int(is_image_BS.sum()) != len(features_FH):
                raise ValueError(
                    f"{int(is_image_BS.sum())} image placeholders, but {len(features_FH)} image "
                    f"features; the placeholder expansion and image_grid_thw disagree"
                )
            embedded_SBH = _place(embedded_SBH, is_image_BS, features_FH)
            zeros = torch.zeros_like(embedded_SBH)
            deepstack = [_place(zeros, is_image_BS, level_FH) for level_FH in deepstack]
        if self.config.sequence_parallel:
            embedded_SBH = scatter_to_sequence_parallel_region(embedded_SBH)
            deepstack = [scatter_to_sequence_parallel_region(level) for level in deepstack]
        self._deepstack_SBH = deepstack
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

    def _see(self, pixels: Tensor, grid_thw: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        seen = self.vision_model(pixels.to(self.config.params_dtype), grid_thw=grid_thw)
        return seen.pooler_output, list(getattr(seen, "deepstack_features", None) or ())

    def _deepstack_hook(self, depth: int) -> Any:
        def add(_: nn.Module, __: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any] | None:
            if depth >= len(self._deepstack_SBH):
                return None
            hidden_SBH, context = output
            return hidden_SBH + self._deepstack_SBH[depth], context

        return add


def _place(base_SBH: Tensor, is_image_BS: Tensor, features_FH: Tensor) -> Tensor:
    """`base` with the features at the marked positions; the gradient reaches both."""
    base_BSH = base_SBH.transpose(0, 1)
    placed = base_BSH.masked_scatter(is_image_BS[..., None], features_FH.to(base_BSH.dtype))
    return placed.transpose(0, 1).contiguous()
