"""Experts of a layer as two grouped matrix products instead of two products an expert.

The weights stay where SequentialMLP has them, expert by expert, so checkpoints, shards over ranks
and adapters know no difference; they are stacked for the product, which costs one copy of them.

Shape suffixes: T tokens sent to this rank's experts, sorted by expert, E experts, H hidden, F the
experts' width on this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from vlmcore.models.arriving import await_weights
from vlmcore.models.gated import joint_swiglu


class GroupedExperts(SequentialMLP):
    """A SequentialMLP of gated experts without biases; adapted experts run one after the other."""

    def forward(
        self, tokens_TH: Tensor, tokens_per_expert: Tensor, probs_T: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """What the experts make of their tokens, times the router's probabilities [T, H]."""
        if any(hasattr(expert.linear_fc1, "adapter") or hasattr(expert.linear_fc2, "adapter")
               for expert in self.local_experts):  # fmt: skip
            sequential: tuple[Tensor, None] = super().forward(tokens_TH, tokens_per_expert, probs_T)
            return sequential
        ends_E = torch.as_tensor(tokens_per_expert).cumsum(0).to(tokens_TH.device, torch.int32)
        both_TF = F.grouped_mm(tokens_TH, self._stacked("linear_fc1"), offs=ends_E)
        inner_TF = joint_swiglu(both_TF)
        weighted_TF = (inner_TF * probs_T.unsqueeze(-1)).to(inner_TF.dtype)
        return F.grouped_mm(weighted_TF, self._stacked("linear_fc2"), offs=ends_E), None

    def _stacked(self, name: str) -> Tensor:
        """The experts' weights of one layer, [E, in, out]."""
        layers: list[Any] = [getattr(expert, name) for expert in self.local_experts]
        for layer in layers:
            await_weights(layer)
        return torch.stack([layer.weight for layer in layers]).transpose(1, 2)
