"""Which tokens of a row a context parallel rank holds, and how ranks share keys and values.

A row of T tokens is cut into 2 · size chunks; rank r holds chunks r and 2 · size − 1 − r, so that
early and late tokens, and with them the causal work, are dealt out evenly. The row is cut, not its
samples: a sample may begin on one rank and end on another.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor


def context_parallel_size() -> int:
    """Ranks that hold one row together."""
    return max(int(parallel_state.get_context_parallel_world_size()), 1)  # 0 without groups


def chunks_of(num_tokens: int, *, rank: int, size: int) -> tuple[tuple[int, int], ...]:
    """Begin and end of what a rank holds of a row, in the order in which it holds them.

    Raises:
        ValueError: The chunks would differ in length.
    """
    if size == 1:
        return ((0, num_tokens),)
    if num_tokens % (2 * size):
        raise ValueError(
            f"a row of {num_tokens} tokens is not cut evenly over {size} context parallel ranks; "
            f"pad rows to a multiple of {2 * size}"
        )
    length = num_tokens // (2 * size)
    return tuple((i * length, (i + 1) * length) for i in (rank, 2 * size - 1 - rank))


def own_part(whole: Tensor, *, dim: int) -> Tensor:
    """This rank's tokens of a tensor that has the whole row's along `dim`."""
    size = context_parallel_size()
    if size == 1:
        return whole
    rank = parallel_state.get_context_parallel_rank()
    chunks = chunks_of(whole.shape[dim], rank=rank, size=size)
    return torch.cat([whole.narrow(dim, a, b - a) for a, b in chunks], dim=dim)


def whole_row(part: Tensor) -> Tensor:
    """The row of which every rank holds a part along the first dimension, in its own order.

    Backward, each rank gets the sum of what all of them say of its part.
    """
    size = context_parallel_size()
    if size == 1:
        return part
    group = parallel_state.get_context_parallel_group()
    by_rank = gather_from_sequence_parallel_region(part.contiguous(), group=group)
    chunks = by_rank.chunk(2 * size)  # of ranks 0, 0, 1, 1 …
    firsts, lasts = chunks[::2], chunks[1::2]
    return torch.cat([*firsts, *reversed(lasts)])
