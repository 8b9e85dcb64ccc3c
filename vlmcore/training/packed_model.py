"""A transformers model as it trains: rows of several samples in, sums of their losses out.

The vision side sees all images of a row, its features replace the embeddings of the placeholders,
and the decoder attends within each sample. Logits exist for trained tokens alone, a chunk of them
at a time.

Shape suffixes: T tokens of a row, H hidden, N trained tokens, V vocabulary, E experts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmcore.dataloading.samples import PackedRow
from vlmcore.models.gated import gate_by_hand
from vlmcore.models.norm import norm_by_hand
from vlmcore.models.patch_projection import project_by_product
from vlmcore.models.vision import Placeholders, marked, reach, see
from vlmcore.models.vision_attention import NAME, attend_by_length, register

CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class RowLosses:
    """Of one row; those of routers are means over its tokens, summed over layers.

    Attributes:
        total: Sum of the weighted losses of its trained tokens, fp32.
        balance: Load balancing loss of the experts, 0 for a dense model.
        z: Loss on large router logits.
    """

    total: Tensor
    balance: Tensor
    z: Tensor


class PackedModel(nn.Module):
    """A causal language model, or one that sees, with its loss.

    Args:
        model: From transformers; its adapters, if any, stand inside.
        mrope: Whether positions are (temporal, height, width) triples.
        placeholders: Token ids that features replace; None for a text model.
        dtype: Of the computation.
        max_tokens: Of a row.
        gathers: Whether weights are whole only while their module runs (DeepSpeed's ZeRO-3).

    Attributes:
        idle_inputs: What the vision side looks at where a row has no image, so that backward
            reaches the same weights on every rank; its features count nothing. Empty: it rests.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        mrope: bool,
        placeholders: Placeholders | None,
        dtype: torch.dtype,
        max_tokens: int,
        gathers: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.mrope = mrope
        self.placeholders = placeholders
        self.dtype = dtype
        # the same on every rank, whatever its row trains: some shardings gather for each chunk
        self.num_chunks = -(-max_tokens // CHUNK_TOKENS)
        self.idle_inputs: dict[str, Tensor] = {}
        # Of torch's two ways to compute again in backward one asks for frozen weights when ZeRO-3
        # has let go of them, the other gives a weight that is used twice its gradient twice
        # (DeepSpeed 0.19).
        frozen = any(not weight.requires_grad for weight in self.decoder.parameters())
        self.reentrant = gathers and frozen
        self.head_reentrant = gathers and not self.head.weight.requires_grad
        register()
        self.decoder.config._attn_implementation = NAME
        if placeholders is not None:
            attend_by_length(self.vision)
            project_by_product(self.vision)
        gate_by_hand(self.model)
        norm_by_hand(self.model)
        self._routers = _RouterLogits(self.decoder)

    @property
    def vision(self) -> Any:
        """The module that turns pixels into features."""
        inner: Any = self.model.model
        return inner

    @property
    def decoder(self) -> Any:
        """The text model, without its output layer."""
        inner: Any = self.model.model
        return inner if self.placeholders is None else inner.language_model

    @property
    def head(self) -> Any:
        """The output layer."""
        return self.model.lm_head

    @property
    def has_experts(self) -> bool:
        """Whether routers send tokens to experts."""
        return bool(self._routers.routers)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        loss_scale: Tensor,
        cu_seqlens: Tensor,
        **vision_inputs: Tensor,
    ) -> RowLosses:
        """Losses of a row.

        Args:
            input_ids: [T].
            position_ids: [3, T]; they begin anew with each sample.
            labels: [T], already shifted; negative where nothing is trained.
            loss_scale: [T], the weight of each label.
            cu_seqlens: Where samples begin, [samples + 1], int32.
            vision_inputs: What the processor returns for all images and videos of the row.

        Raises:
            ValueError: The placeholders do not match the features.
        """
        embedded_TH = self.decoder.embed_tokens(input_ids).to(self.dtype)
        embedded_TH, deepstack = self._with_features(embedded_TH, input_ids, vision_inputs)
        if self.reentrant and not embedded_TH.requires_grad:
            embedded_TH.requires_grad_()  # else layers computed again would get no gradient
        self._routers.clear()
        hidden_TH = self.decoder(
            inputs_embeds=embedded_TH[None],
            position_ids=position_ids[:, None] if self.mrope else position_ids[:1],
            use_cache=False,
            cu_seq_lens_q=cu_seqlens,
            max_length_q=int(cu_seqlens.diff().max()),
            **deepstack,
        ).last_hidden_state[0]
        balance, z = self._routers.losses(like=hidden_TH)
        return RowLosses(self._weighted_sum(hidden_TH, labels, loss_scale), balance, z)

    def _with_features(
        self, embedded_TH: Tensor, input_ids: Tensor, vision_inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Embeddings with the features in place, and what the first layers get on top of them."""
        if self.placeholders is None:
            return embedded_TH, {}
        looked_at = vision_inputs or self.idle_inputs
        found = see(self.vision, looked_at, self.placeholders, dtype=self.dtype)
        if not vision_inputs:
            zero = reach(found).to(embedded_TH.dtype) if found else 0
            return embedded_TH + zero, {}
        is_seen_T = torch.zeros_like(input_ids, dtype=torch.bool)
        levels: dict[int, Tensor] = {}
        for seen in found:
            where_T = marked(input_ids, seen)
            is_seen_T |= where_T
            embedded_TH = _place(embedded_TH, where_T, seen.embedded)
            for depth, features_FH in enumerate(seen.deepstack):
                level = levels.get(depth, torch.zeros_like(embedded_TH))
                levels[depth] = _place(level, where_T, features_FH)
        if not levels:
            return embedded_TH, {}
        return embedded_TH, {
            "visual_pos_masks": is_seen_T[None],
            "deepstack_visual_embeds": [levels[depth][is_seen_T] for depth in range(len(levels))],
        }

    def _weighted_sum(self, hidden_TH: Tensor, labels_T: Tensor, weights_T: Tensor) -> Tensor:
        (trained_N,) = torch.where(labels_T >= 0)
        total = hidden_TH.new_zeros((), dtype=torch.float32)
        for index in trained_N.tensor_split(self.num_chunks):
            inputs = hidden_TH[index], labels_T[index], weights_T[index]
            if self.num_chunks == 1:
                total = total + self._chunk_sum(*inputs)
            else:
                total = total + checkpoint(
                    self._chunk_sum, *inputs, use_reentrant=self.head_reentrant
                )
        return total

    def _chunk_sum(self, hidden_NH: Tensor, labels_N: Tensor, weights_N: Tensor) -> Tensor:
        logits_NV = self.head(hidden_NH)
        return (F.cross_entropy(logits_NV.float(), labels_N, reduction="none") * weights_N).sum()


def row_inputs(row: PackedRow, place: torch.device) -> dict[str, Tensor]:
    """A row as `PackedModel` takes it."""
    tensors = {
        "input_ids": row.input_ids, "position_ids": row.position_ids, "labels": row.labels,
        "loss_scale": row.loss_scale, "cu_seqlens": row.cu_seqlens, **row.vision,
    }  # fmt: skip
    return {name: tensor.to(place, non_blocking=True) for name, tensor in tensors.items()}


def _place(base_TH: Tensor, where_T: Tensor, features_FH: Tensor) -> Tensor:
    """`base` with the features at the marked positions; the gradient reaches both."""
    return base_TH.masked_scatter(where_T[:, None], features_FH.to(base_TH.dtype))


class _RouterLogits:
    """Hears what the routers of a decoder's experts say of a row, layer by layer."""

    def __init__(self, decoder: nn.Module) -> None:
        self.routers = {
            name: module for name, module in decoder.named_modules() if name.endswith("mlp.gate")
        }
        self._found: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for name, module in self.routers.items():
            module.register_forward_hook(self._keep(name))

    def clear(self) -> None:
        """Forgets the row before."""
        self._found.clear()

    def losses(self, *, like: Tensor) -> tuple[Tensor, Tensor]:
        """Switch Transformers' balancing loss (arXiv 2101.03961) and ST-MoE's z-loss (2202.08906).

        Args:
            like: Says where zeros lie, for a model without experts.
        """
        balance = z = like.new_zeros((), dtype=torch.float32)
        for heard in self._found.values():
            logits_TE, chosen_TK = heard[0]  # the first: recomputation says it again
            logits_TE = logits_TE.float()
            num_experts, top_k = logits_TE.shape[1], chosen_TK.shape[1]
            share_E = F.one_hot(chosen_TK, num_experts).sum(1).float().mean(0)
            chance_E = logits_TE.softmax(-1).mean(0)
            balance = balance + num_experts / top_k * (share_E * chance_E).sum()
            z = z + logits_TE.logsumexp(-1).pow(2).mean()
        return balance, z

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            logits_TE, _, chosen_TK = output
            self._found[name].append((logits_TE, chosen_TK))

        return hook
