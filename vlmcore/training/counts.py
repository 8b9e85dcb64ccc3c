"""What a step counts: tokens and samples of the rows of all ranks that read different data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from vlmcore import megatron_cpu
from vlmcore.dataloading.samples import PackedRow


def counts_of(
    batch: Sequence[PackedRow], *, group: dist.ProcessGroup | None = None
) -> dict[str, Any]:
    """Over all data parallel ranks; every rank of a replica knows the whole rows.

    Args:
        batch: This rank's micro batches.
        group: The data parallel ranks; None: all ranks.

    Returns:
        Numbers by name; where samples were dropped, also `dropped_by_cause`.
    """
    counts = torch.tensor(
        [
            sum(int((row.loss_scale > 0).sum()) for row in batch),
            sum(num_real(row) for row in batch),
            sum(row.num_samples for row in batch),
            sum(row.num_dropped for row in batch),
            sum(_attended_pairs(row) for row in batch),
        ],
        device=megatron_cpu.device(),
    )
    dist.all_reduce(counts, group=group)
    names = ("loss_tokens", "tokens", "samples", "dropped", "attended_pairs")
    found: dict[str, Any] = dict(zip(names, counts.tolist(), strict=True))
    if found["dropped"]:
        found["dropped_by_cause"] = _dropped_by_cause(batch, group)
    return found


def _dropped_by_cause(
    batch: Sequence[PackedRow], group: dist.ProcessGroup | None
) -> dict[str, int]:
    here = sum((Counter(row.dropped) for row in batch), Counter())
    everywhere: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everywhere, here, group=group)
    return dict(sum(everywhere, Counter()).most_common())


def num_real(row: PackedRow) -> int:
    """Tokens of samples; what follows pads the row."""
    return int(row.cu_seqlens[row.num_samples])


def _attended_pairs(row: PackedRow) -> int:
    """Pairs of a token and one that it attends to, itself included."""
    ends = row.cu_seqlens[: row.num_samples + 1].tolist()
    return sum((end - start) * (end - start + 1) // 2 for start, end in pairwise(ends))
