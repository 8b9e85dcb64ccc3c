"""Attention within samples of any length that follow each other in one row, without padding.

A GPU in half precision has torch's kernel, a CPU in fp32 ours, where it compiles; elsewhere callers
form batches of like length.

Shape suffixes: S queries of a row, R those that are read, T keys, N query heads, G kv heads, D head
dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmcore.kernels import attention
from vlmcore.kernels.compiled import serves


def has_varlen_kernel(x: Tensor) -> bool:
    """Whether there is one for the device and type of `x`."""
    if x.is_cuda:
        return x.dtype in (torch.bfloat16, torch.float16)
    return serves(x)


def varlen_attention(
    query_SND: Tensor,
    key_TGD: Tensor,
    value_TGD: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    *,
    longest: tuple[int, int],
    scale: float,
    causal: bool,
    read_R: Tensor | None = None,
) -> Tensor:
    """Context [S, N, D], or [R, N, D]; `has_varlen_kernel` must be true of the query.

    Args:
        query_SND: One type and device for all three.
        key_TGD: N is a multiple of G.
        value_TGD: See `key_TGD`.
        query_starts: First query of each sample and the end of the last, [samples + 1], int32.
        key_starts: Likewise of keys.
        longest: Queries of the sample with the most, and keys.
        scale: Of the scores.
        causal: A sample's last query sees its last key, the one before it one key less, and so on.
        read_R: Queries whose context is asked for, ascending; None: all.
    """
    starts = query_starts, key_starts
    if not query_SND.is_cuda:
        visible = _visible(*starts) if causal else None
        if read_R is not None:
            query_SND = query_SND.index_select(0, read_R)
            visible = None if visible is None else visible.index_select(0, read_R)
            query_starts = torch.searchsorted(read_R, query_starts, out_int32=True)
        return attention.attend(
            query_SND, key_TGD, value_TGD, query_starts, key_starts, visible, scale=scale
        )
    from torch.nn.attention.varlen import varlen_attn

    context: Any = varlen_attn(
        query_SND, key_TGD, value_TGD, *starts, *longest,
        scale=scale, window_size=(-1, 0 if causal else -1),
        enable_gqa=query_SND.shape[1] != key_TGD.shape[1],
    )  # fmt: skip
    whole: Tensor = context
    return whole if read_R is None else whole.index_select(0, read_R)


def _visible(query_starts: Tensor, key_starts: Tensor) -> Tensor:
    """How many keys of its sample each query sees, [S], int32."""
    num_queries, num_keys = query_starts.diff(), key_starts.diff()
    before = (num_keys - num_queries - query_starts[:-1]).repeat_interleave(num_queries)
    return torch.arange(1, len(before) + 1, dtype=torch.int32) + before
