"""Queries and keys turned by their rotary positions, in few operations.

Autograd's backward of transformers' formula cuts, negates and joins halves, which costs more on a
CPU than the multiplications; turning back by the same angles is the gradient.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlmcore.kernels import rowwise
from vlmcore.kernels.compiled import serves


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns pairs (d, d + D/2) of the last dimension by their angles.

    Args:
        x: [..., D].
        cos: Of the angles, [..., D], both halves alike; broadcasts to `x`.
        sin: Likewise.
    """
    out: Tensor = _Turn.apply(x, cos, sin)
    return out


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    if serves(x, cos, sin) and x.ndim == cos.ndim and cos.numel() * x.shape[-2] == x.numel():
        tokens, waves = x.flatten(0, -3), (cos.flatten(0, -2), sin.flatten(0, -2))
        return rowwise.turned(tokens, *waves, direction).view(x.shape)
    out, half = x * cos, x.shape[-1] // 2
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-direction)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=direction)
    return out


def turn_by_hand(vision_model: nn.Module) -> None:
    """Has a transformers tower with rotary positions turn its queries and keys so."""
    for module in {type(part).__module__ for part in vision_model.modules()}:
        if hasattr(sys.modules[module], "apply_rotary_pos_emb_vision"):
            sys.modules[module].apply_rotary_pos_emb_vision = _turn_both  # type: ignore[attr-defined]


def _turn_both(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Of a tower, in fp32: query and key [S, heads, D], waves [S, D]."""
    waves = cos.unsqueeze(-2).float(), sin.unsqueeze(-2).float()
    return turn(query.float(), *waves).to(query.dtype), turn(key.float(), *waves).to(key.dtype)
