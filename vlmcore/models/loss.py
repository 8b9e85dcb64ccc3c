"""Per-token cross entropy without the logits of a whole row in memory.

Logits are computed for tokens that are trained on, a chunk of them at a time; what backward needs
of a chunk is computed again there. At 152 k tokens of vocabulary the logits of 8 k tokens alone
are 5 GB in fp32.

Shape suffixes: S tokens of a row on this rank, B rows, T = B · S, N trained tokens, H hidden,
V vocabulary on this rank.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 2**27  # of a chunk, 512 MB in fp32
MIN_TOKENS = 1024


def token_losses(
    hidden_SBH: Tensor,
    weight_VH: Tensor,
    labels_BS: Tensor,
    *,
    vocab_size: int,
    sequence_parallel: bool,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Cross entropy of each token [B, S], 0 where the label is negative.

    Args:
        hidden_SBH: What enters the output layer; under sequence parallelism this rank's part. Or
            of the trained tokens alone, [N, 1, H].
        weight_VH: The output layer's rows on this tensor parallel rank.
        labels_BS: The next tokens; negative where nothing is trained.
        vocab_size: Without the rows that only pad the vocabulary over the ranks.
        sequence_parallel: Whether `hidden_SBH` is a part.
        chunk_tokens: Tokens whose logits are in memory together; None: by their size.
    """
    if sequence_parallel:
        hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH)
    else:
        hidden_SBH = copy_to_tensor_model_parallel_region(hidden_SBH)
    hidden_TH, labels_T = hidden_SBH.transpose(0, 1).flatten(0, 1), labels_BS.flatten()
    (trained_N,) = torch.where(labels_T >= 0)
    losses_T = hidden_TH.new_zeros(len(labels_T), dtype=torch.float32)
    if not len(trained_N):  # all the same: other ranks wait for this one's part of the gradient
        # one row each reaches all of both, and its sum cannot overflow to 0 · inf
        reach = hidden_TH[0].float().mean() + weight_VH[0].float().mean()
        return losses_T.view_as(labels_BS) + 0.0 * reach
    if len(hidden_TH) != len(trained_N):
        hidden_TH = hidden_TH.index_select(0, trained_N)
    compute = partial(_losses, num_rows=_rows_in_use(len(weight_VH), vocab_size))
    chunk_tokens = chunk_tokens or max(MIN_TOKENS, MAX_LOGITS // len(weight_VH))
    if len(trained_N) > chunk_tokens and torch.is_grad_enabled():
        compute = partial(checkpoint, compute, use_reentrant=False, preserve_rng_state=False)
    parts = [
        compute(hidden_NH, weight_VH, labels_N)
        for hidden_NH, labels_N in zip(
            hidden_TH.split(chunk_tokens), labels_T[trained_N].split(chunk_tokens), strict=True
        )
    ]
    return losses_T.index_put((trained_N,), torch.cat(parts)).view_as(labels_BS)


def _losses(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, *, num_rows: int) -> Tensor:
    logits_NV = F.linear(hidden_NH, weight_VH)
    logits_NV[:, num_rows:] = torch.finfo(logits_NV.dtype).min
    losses: Tensor = vocab_parallel_cross_entropy(logits_NV, labels_N)
    return losses


def _rows_in_use(width: int, vocab_size: int) -> int:
    """Rows of this rank's part of the output layer that belong to tokens."""
    start: int = parallel_state.get_tensor_model_parallel_rank() * width
    return max(vocab_size - start, 0)
