"""Attention of Qwen's vision towers over all images of one length at once, where there is no GPU.

Without flash-attn, transformers' towers attend image by image (and window by window), a call each:
with many small images in a row most of the time goes into the calls. `attend_by_length` has them
attend once for each distinct length instead. It ends when transformers' own towers do so.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# "flash" in its name makes the towers hand over all images and where each begins (transformers
# 5.19, `is_flash_attention_requested`); they cut images apart for every other name.
NAME = "flash_by_length_on_sdpa"


def attend_by_length(vision_model: nn.Module) -> None:
    """Sets up a tower that knows where its images begin; leaves every other one as it is.

    Args:
        vision_model: From `build_vision_model`.
    """
    from transformers import AttentionInterface

    tower: Any = getattr(vision_model, "visual", None)
    if tower is None or tower.config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(NAME, _attend)
    tower.config._attn_implementation = NAME


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Full attention within each image.

    Args:
        module: The attention layer, unused.
        query: [1, heads, S, D]; so are `key` and `value`, with as many or fewer heads.
        key: See `query`.
        value: See `query`.
        attention_mask: None.
        scaling: Of the scores.
        cu_seq_lens_q: Where images begin, [images + 1].
        dropout: Of the attention weights.

    Returns:
        [1, S, heads, D], and no weights.
    """
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
            q, k, v, dropout_p=dropout, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        rows = out.transpose(1, 2).flatten(0, 1)
        mixed = rows if whole else mixed.index_copy(0, where, rows)
    return mixed[None], None
