"""Norms, gated units and rotations on a CPU in fp32, by `rowwise.cpp`; a library must be there.

Torch's operations for the same write between two and five intermediate results to memory.
"""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmcore.kernels.compiled import function

FEW_NUMBERS = 500_000  # of an input; threads take longer to start than they save


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x` [..., H] over the root of its mean square, times `weight` [H]."""
    out: Tensor = _RMSNorm.apply(x, weight, eps)
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up; of two like tensors."""
    out: Tensor = _SwiGLU.apply(gate, up)
    return out


def joint_swiglu(x: Tensor) -> Tensor:
    """silu(gate) · up, [..., F], of `x` [..., 2 F], which holds the gate first."""
    out: Tensor = _JointSwiGLU.apply(x)
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        width = len(weight)
        out, scale = torch.empty_like(x), x.new_empty(x.numel() // width)
        function("rms_norm_forward", c_void_p, c_void_p, c_int64, c_int64, c_float,
                 c_void_p, c_void_p, c_int)(
            x.data_ptr(), weight.data_ptr(), len(scale), width, eps,
            out.data_ptr(), scale.data_ptr(), _parts(x),
        )  # fmt: skip
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        grad, parts = grad.contiguous(), _parts(x)
        x_grad = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        weight_grads = x.new_empty(parts, len(weight))
        function("rms_norm_backward", c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64,
                 c_void_p, c_void_p, c_int)(
            grad.data_ptr(), x.data_ptr(), weight.data_ptr(), scale.data_ptr(), len(scale),
            len(weight), None if x_grad is None else x_grad.data_ptr(), weight_grads.data_ptr(),
            parts,
        )  # fmt: skip
        return x_grad, weight_grads.sum(0) if ctx.needs_input_grad[1] else None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grads = torch.empty_like(gate), torch.empty_like(up)
        _gated_backward(grad, gate, up, *grads)
        return grads


class _JointSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        return _gated(*x.chunk(2, dim=-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        x_grad = torch.empty_like(x)
        _gated_backward(grad, *x.chunk(2, dim=-1), *x_grad.chunk(2, dim=-1))
        return x_grad


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty(gate.shape)
    function("swiglu_forward", c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int)(
        gate.data_ptr(), up.data_ptr(), gate.stride(-2), *_rows(gate), out.data_ptr(), _parts(gate)
    )
    return out


def _gated_backward(
    grad: Tensor, gate: Tensor, up: Tensor, gate_grad: Tensor, up_grad: Tensor
) -> None:
    grad = grad.contiguous()
    function("swiglu_backward", c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64,
             c_void_p, c_void_p, c_int)(
        grad.data_ptr(), gate.data_ptr(), up.data_ptr(), gate.stride(-2), *_rows(gate),
        gate_grad.data_ptr(), up_grad.data_ptr(), _parts(gate),
    )  # fmt: skip


def _rows(x: Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[-1], x.shape[-1]


def turned(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """Pairs (d, d + D/2) of `x` [S, heads, D] turned by angles with waves [S, D]; no gradient."""
    if x.stride(2) != 1:
        x = x.contiguous()
    assert cos.stride() == sin.stride() and cos.stride(1) == 1
    out = torch.empty(x.shape)
    function("turn", c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_int64,
             c_int64, c_float, c_void_p, c_int)(
        x.data_ptr(), x.stride(0), x.stride(1), cos.data_ptr(), sin.data_ptr(), cos.stride(0),
        *x.shape, direction, out.data_ptr(), _parts(x),
    )  # fmt: skip
    return out


def _parts(x: Tensor) -> int:
    """Threads for work on `x`."""
    return 1 if x.numel() < FEW_NUMBERS else torch.get_num_threads()
