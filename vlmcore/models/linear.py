"""Megatron's linear layers, by torch's own operation where their product sends nothing to others.

Megatron-Core (0.16) runs its own autograd function for every layer, which adds a bias by itself and
spends on a CPU as long in Python as a small product takes.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor


class _Linear:
    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        **options: Any,
    ) -> Tensor:
        if not (allreduce_dgrad or sequence_parallel):
            return F.linear(input, weight, bias)
        parallel: Any = super()
        out: Tensor = parallel._forward_impl(
            input,
            weight,
            bias=bias,
            allreduce_dgrad=allreduce_dgrad,
            sequence_parallel=sequence_parallel,
            **options,
        )
        return out


class ColumnLinear(_Linear, ColumnParallelLinear):
    """Its output is split over the tensor parallel ranks."""


class RowLinear(_Linear, RowParallelLinear):
    """Its input is, and outputs are summed afterwards."""
