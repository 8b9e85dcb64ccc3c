"""Attention of transformers modules over what one row holds: images of a tower, samples of text.

Without flash-attn, transformers' towers attend image by image (and window by window), a call each,
and its decoders know packed samples only as a T × T mask. `attend` takes a row as it is: by a
kernel for samples of any length where there is one, else once for each distinct length.
It ends when transformers does so without flash-attn.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmcore.models.varlen_attention import has_varlen_kernel, varlen_attention

# "flash" in its name makes the towers hand over all images and where each begins (transformers
# 5.19, `is_flash_attention_requested`); they cut images apart for every other name.
NAME = "flash_by_length_on_sdpa"


def register() -> None:
    """Makes `attend` known to transformers under `NAME`, without a mask."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)


def attend_by_length(vision_model: nn.Module) -> None:
    """Sets up a tower that knows where its images begin; leaves every other one as it is.

    Args:
        vision_model: From `build_vision_model`.
    """
    tower: Any = getattr(vision_model, "visual", None)
    if tower is None or tower.config._attn_implementation != "sdpa":
        return
    register()
    tower.config._attn_implementation = NAME


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: Tensor | int | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within each image or sample.

    Args:
        module: The attention layer; says whether it is causal where `is_causal` does not.
        query: [1, heads, S, D]; so are `key` and `value`, with as many or fewer heads.
        key: See `query`.
        value: See `query`.
        attention_mask: None.
        scaling: Of the scores.
        cu_seq_lens_q: Where images or samples begin, [images + 1], int32.
        max_length_q: Tokens of the longest one, where the caller knows.
        dropout: Of the attention weights.
        is_causal: Whether a token attends only to those before it.

    Returns:
        [1, S, heads, D], and no weights.
    """
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    query, key = query.to(value.dtype), key.to(value.dtype)  # fp32 after norms under autocast
    if has_varlen_kernel(value) and not dropout:
        longest = int(cu_seq_lens_q.diff().max() if max_length_q is None else max_length_q)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        context = varlen_attention(
            q, k, v, cu_seq_lens_q, cu_seq_lens_q,
            longest=(longest, longest), scale=scaling, causal=causal,
        )  # fmt: skip
        return context[None], None
    starts, lengths = cu_seq_lens_q[:-1], cu_seq_lens_q.diff()
    mixed = torch.empty_like(query[0].transpose(0, 1))  # [S, heads, D]
    for length in lengths.unique().tolist():
        first = starts[lengths == length]
        where = (first[:, None] + torch.arange(length, device=first.device)).flatten()
        whole = len(where) == query.shape[2]  # in order, since image follows image
        q, k, v = (
            (x[0] if whole else x[0].index_select(1, where))
            .unflatten(1, (-1, length))
            .transpose(0, 1)
            for x in (query, key, value)
        )
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            dropout_p=dropout,
            is_causal=causal,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        rows = out.transpose(1, 2).flatten(0, 1)
        mixed = rows if whole else mixed.index_copy(0, where, rows)
    return mixed[None], None
