"""Gated linear units of SiLU, whose backward keeps their input alone."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vlmcore.kernels import rowwise
from vlmcore.kernels.compiled import serves

PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}  # of transformers 5.19's gated layers
SILU = ("SiLU", "SiLUActivation")


def joint_swiglu(x: Tensor) -> Tensor:
    """silu(gate) · up, [..., F], of `x` [..., 2 F], which holds the gate first."""
    if serves(x):
        return rowwise.joint_swiglu(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class SwiGLU:
    """`joint_swiglu` as an activation that Megatron builds; no module, since it has no state."""

    def __init__(self, config: Any) -> None:
        pass

    def __call__(self, x: Tensor) -> Tensor:
        """Of what the first linear layer gave."""
        return joint_swiglu(x)


class _TransformersMLP(nn.Module):
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        inner = rowwise.swiglu(gate, up) if serves(gate, up) else F.silu(gate) * up
        out: Tensor = self.down_proj(inner)
        return out


def gate_by_hand(model: nn.Module) -> None:
    """Has a transformers model's gated layers run so; the weights stay what they are."""
    for module in model.modules():
        parts = {name for name, _ in module.named_children()}
        if parts == PARTS and type(module.act_fn).__name__ in SILU:
            module.__class__ = _TransformersMLP
