"""A vision-language model for Megatron-Core: transformers' vision modules before a GPTModel.

The vision side is replicated on every tensor parallel rank of the first pipeline stage, so its
weights are copied verbatim. Its features replace the embeddings of the placeholders; deepstack
features (Qwen3-VL) are added to the hidden states after the first decoder layers.

Shape suffixes: B rows, S tokens of a row, H hidden, F image features (merged patches) of a batch.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from vlmcore.models.arriving import await_weights
from vlmcore.models.context_parallel import own_part
from vlmcore.models.decoder import Decoder
from vlmcore.models.layers import RowParams
from vlmcore.models.vision import Placeholders, marked, reach, see


class VisionLanguageModel(MegatronModule):
    """Vision side and decoder, as far as they stand on this rank.

    Args:
        config: The decoder's config.
        language_model: A Decoder built with `scatter_embedding=False`.
        vision_model: From `build_vision_model`; None beyond the first pipeline stage.
        placeholders: Token ids that the features replace.

    Attributes:
        idle_inputs: What the vision side looks at where a row has no image, so that backward
            reaches the same weights on every rank; its features count nothing. Empty: it rests.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        language_model: Decoder,
        vision_model: nn.Module | None,
        placeholders: Placeholders,
    ) -> None:
        super().__init__(config)
        self.model_type = language_model.model_type  # the schedules ask for it
        self.language_model = language_model
        self.vision_model = vision_model
        self.placeholders = placeholders
        self.idle_inputs: dict[str, Tensor] = {}
        # what Megatron's reduction of tied gradients over pipeline stages asks for
        self.pre_process = language_model.pre_process
        self.post_process = language_model.post_process
        self.share_embeddings_and_output_weights = (
            language_model.share_embeddings_and_output_weights
        )

    def shared_embedding_or_output_weight(self) -> Tensor:
        """This stage's copy of the tied weight."""
        weight: Tensor = self.language_model.shared_embedding_or_output_weight()
        return weight

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
        packed_seq_params: RowParams | None = None,
        is_padding_BS: Tensor | None = None,
        **vision_inputs: Any,
    ) -> Tensor:
        """Per-token losses [B, S] where labels are given, else logits [B, S, vocabulary].

        Before the last pipeline stage: hidden states [S, B, H]. Context parallel ranks are given
        whole rows, and return what belongs to their part.

        Args:
            input_ids: [B, S].
            position_ids: [3, B, S].
            attention_mask: Unused; attention is causal.
            labels: [B, S], already shifted; negative where nothing is trained.
            packed_seq_params: Where samples begin, with B = 1.
            is_padding_BS: What routers of experts leave out of their losses.
            vision_inputs: What the processor returns for the images and videos of all rows, in
                order: `pixel_values`, `image_grid_thw`, `pixel_values_videos` …

        Raises:
            ValueError: The placeholders do not match the features.
        """
        embedded_SBH: Tensor | None = None
        deepstack: list[Tensor] = []
        if self.vision_model is not None:
            embedded_SBH, deepstack = self._embed(input_ids, vision_inputs)
        out: Tensor = self.language_model(
            input_ids,
            position_ids,
            attention_mask,
            decoder_input=embedded_SBH,
            labels=labels,
            packed_seq_params=packed_seq_params,
            deepstack=deepstack,
            is_padding_BS=is_padding_BS,
        )
        return out

    def _embed(
        self, input_ids: Tensor, vision_inputs: dict[str, Any]
    ) -> tuple[Tensor, list[Tensor]]:
        """Embeddings with the features in place, and what each of the first layers gets on top."""
        embedded_SBH = self.language_model.embedding(input_ids, None)
        deepstack: dict[int, Tensor] = {}
        assert self.vision_model is not None
        await_weights(self.vision_model)
        is_idle = not vision_inputs and torch.is_grad_enabled()
        looked_at = self.idle_inputs if is_idle else vision_inputs
        dtype = self.config.params_dtype
        found = see(self.vision_model, looked_at, self.placeholders, dtype=dtype)
        if is_idle and found:
            embedded_SBH, found = embedded_SBH + reach(found).to(embedded_SBH.dtype), []
        for seen in found:
            is_seen_BS = marked(input_ids, seen)
            embedded_SBH = _place(embedded_SBH, is_seen_BS, seen.embedded)
            for depth, features_FH in enumerate(seen.deepstack):
                level_SBH = deepstack.get(depth, torch.zeros_like(embedded_SBH))
                deepstack[depth] = _place(level_SBH, is_seen_BS, features_FH)
        levels = [embedded_SBH, *(deepstack[depth] for depth in range(len(deepstack)))]
        levels = [own_part(level, dim=0) for level in levels]
        if self.config.sequence_parallel:
            levels = [scatter_to_sequence_parallel_region(level) for level in levels]
        return levels[0], levels[1:]


def _place(base_SBH: Tensor, is_seen_BS: Tensor, features_FH: Tensor) -> Tensor:
    """`base` with the features at the marked positions; the gradient reaches both."""
    base_BSH = base_SBH.transpose(0, 1)
    placed = base_BSH.masked_scatter(is_seen_BS[..., None], features_FH.to(base_BSH.dtype))
    return placed.transpose(0, 1).contiguous()
