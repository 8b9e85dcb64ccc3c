"""One optimizer step on packed rows: forward, backward, update, and what it counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from vlmcore import megatron_cpu
from vlmcore.dataloading.encode import IGNORED
from vlmcore.dataloading.samples import PackedRow


def train_step(
    model: DistributedDataParallel, optimizer: MegatronOptimizer, batch: list[PackedRow]
) -> dict[str, Any]:
    """One optimizer step over a batch of micro batches.

    Returns:
        Loss (a mean over trained tokens of all data parallel ranks), gradient norm, and counts of
        tokens, trained tokens, samples and dropped samples over all data parallel ranks.
    """
    model.zero_grad_buffer()
    optimizer.zero_grad()
    losses = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batch),
        model=[model],
        num_microbatches=len(batch),
        seq_length=max(len(row.input_ids) for row in batch),
        micro_batch_size=1,
        forward_only=False,
    )
    updated, grad_norm, _ = optimizer.step()
    counts = torch.tensor(
        [
            sum(float(part["loss_sum"]) for part in losses),
            sum(float(part["loss_tokens"]) for part in losses),
            sum(len(row.input_ids) for row in batch),
            sum(row.num_samples for row in batch),
            sum(row.num_dropped for row in batch),
        ],
        dtype=torch.float64,
        device=megatron_cpu.device(),
    )
    dist.all_reduce(counts, group=parallel_state.get_data_parallel_group())
    loss_sum, loss_tokens, tokens, samples, dropped = counts.tolist()
    return {
        "loss": loss_sum / max(loss_tokens, 1),
        "grad_norm": float(grad_norm),
        "updated": bool(updated),
        "loss_tokens": int(loss_tokens),
        "tokens": int(tokens),
        "samples": int(samples),
        "dropped": int(dropped),
    }


def forward_step(
    rows: Iterator[PackedRow], model: torch.nn.Module
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
    """Megatron's forward step: per-token losses of a row, and how to sum them."""
    row = next(rows)
    place = megatron_cpu.device()
    labels = row.labels.to(place)[None]
    losses = model(
        row.input_ids.to(place)[None],
        row.position_ids.to(place)[:, None],
        None,
        labels=labels.clamp(min=0),
        packed_seq_params=packed_seq_params(row),
        **vision_inputs(row),
    )
    return losses, partial(_sum_losses, labels != IGNORED)


def packed_seq_params(row: PackedRow) -> PackedSeqParams:
    """Where the samples of a row begin, for PackedAttention."""
    seqlens = row.cu_seqlens.to(megatron_cpu.device())
    longest = int(row.cu_seqlens.diff().max())
    return PackedSeqParams(
        qkv_format="sbhd",  # rotary positions are explicit, so rows stay [S, 1, …]
        cu_seqlens_q=seqlens,
        cu_seqlens_kv=seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def vision_inputs(row: PackedRow) -> dict[str, Tensor]:
    """The vision arguments of the model's forward; none for a row of text."""
    if row.pixel_values is None or row.image_grid_thw is None:
        return {}
    place = megatron_cpu.device()
    return {
        "pixel_values": row.pixel_values.to(place),
        "image_grid_thw": row.image_grid_thw.to(place),
    }


def _sum_losses(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum and count over the trained tokens: Megatron divides by the count over all ranks."""
    total = (losses.float() * mask).sum()
    count = mask.sum().to(torch.int)
    return total, count, {"loss_sum": total.detach(), "loss_tokens": count}
