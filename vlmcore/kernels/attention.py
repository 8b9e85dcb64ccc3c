"""Attention of packed samples on a CPU in fp32, by `attention.cpp`.

Torch's CPU kernel knows one length a call, and takes two to four times as long
(`benchmarks/cpu_kernels.py`).

Shape suffixes: S queries, T keys, N query heads, G key heads, D head dim.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmcore.kernels.compiled import function

FEW_PAIRS = 1_000_000  # of a query's and a key's head; threads take longer to start than they save


def attend(
    query_SND: Tensor,
    key_TGD: Tensor,
    value_TGD: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    visible: Tensor | None,
    *,
    scale: float,
) -> Tensor:
    """Context [S, N, D]; a library must be there.

    Args:
        query_SND: fp32 on the CPU, as are keys and values.
        key_TGD: N is a multiple of G.
        value_TGD: See `key_TGD`.
        query_starts: First query of each sample and the end of the last, [samples + 1], int32.
        key_starts: Likewise of keys.
        visible: How many keys of its sample a query sees, from the first on, [S], int32; at least
            one. None: all of them.
        scale: Of the scores.
    """
    context: Tensor = _Attention.apply(
        query_SND, key_TGD, value_TGD, query_starts, key_starts, visible, scale
    )
    return context


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_SND: Tensor,
        key_TGD: Tensor,
        value_TGD: Tensor,
        query_starts: Tensor,
        key_starts: Tensor,
        visible: Tensor | None,
        scale: float,
    ) -> Tensor:
        given = (_wide(query_SND), _wide(key_TGD), _wide(value_TGD),
                 query_starts, key_starts, visible)  # fmt: skip
        context = torch.empty(query_SND.shape)
        softmaxes = torch.empty(2, query_SND.shape[1], query_SND.shape[0])
        _call("attention_forward", _row(*given, scale=scale), _heads(context), softmaxes.data_ptr())
        ctx.save_for_backward(*given, context, softmaxes)
        ctx.scale = scale
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SND: Tensor) -> tuple[Tensor | None, ...]:
        *given, context, softmaxes = ctx.saved_tensors
        grads = [torch.empty(x.shape) for x in given[:3]]
        grad_SND, row = _wide(grad_SND), _row(*given, scale=ctx.scale)
        _call("attention_backward", row, _heads(context), softmaxes.data_ptr(), _heads(grad_SND),
              *map(_heads, grads))  # fmt: skip
        return *grads, None, None, None, None


class _Heads(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("token", "head")),
    ]


class _Row(ctypes.Structure):
    _fields_ = [
        *((name, _Heads) for name in ("query", "key", "value")),
        *((name, ctypes.c_void_p) for name in ("query_starts", "key_starts", "visible")),
        *((name, ctypes.c_int32) for name in (
            "samples", "queries", "key_heads", "queries_per_key", "width", "threads",
        )),
        ("scale", ctypes.c_float),
    ]  # fmt: skip


def _wide(x: Tensor) -> Tensor:
    """`x`, its last dimension contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads(x: Tensor) -> _Heads:
    return _Heads(x.data_ptr(), x.stride(0), x.stride(1))


def _row(
    query_SND: Tensor,
    key_TGD: Tensor,
    value_TGD: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    visible: Tensor | None,
    *,
    scale: float,
) -> _Row:
    (num_queries, num_heads, width), (num_keys, num_groups, _) = query_SND.shape, key_TGD.shape
    pairs = num_heads * num_queries * num_keys // (len(query_starts) - 1)
    return _Row(
        *map(_heads, (query_SND, key_TGD, value_TGD)),
        query_starts.data_ptr(),
        key_starts.data_ptr(),
        None if visible is None else visible.data_ptr(),
        len(query_starts) - 1,
        num_queries,
        num_groups,
        num_heads // num_groups,
        width,
        1 if pairs < FEW_PAIRS else torch.get_num_threads(),
        scale,
    )


def _call(name: str, row: _Row, *arguments: Any) -> None:
    kinds = (_Heads if isinstance(x, _Heads) else ctypes.c_void_p for x in arguments)
    call = function(name, ctypes.POINTER(_Row), *kinds, returns=ctypes.c_bool)
    if not call(row, *arguments):
        raise MemoryError(f"attention over {row.queries} queries: no memory for its longest sample")
