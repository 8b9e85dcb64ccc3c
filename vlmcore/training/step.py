"""One optimizer step on packed rows: forward, backward, update, and what it counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from vlmcore import megatron_cpu
from vlmcore.dataloading.samples import PackedRow
from vlmcore.models.context_parallel import own_part
from vlmcore.models.layers import RowParams
from vlmcore.training.counts import counts_of, num_real
from vlmcore.training.router_losses import RouterLosses
from vlmcore.training.throughput import LARGEST_MEMORY, sums_and_memory


class TrainStep:
    """Optimizer steps of one model.

    Args:
        chunks: This rank's chunks; several where pipeline stages are interleaved.
        optimizer: Over their parameters.
        router_losses: What routers of experts add to the loss; None for a dense model.
    """

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        router_losses: RouterLosses | None = None,
    ) -> None:
        self.chunks = list(chunks)
        self.optimizer = optimizer
        self.router_losses = router_losses

    def __call__(self, batch: Sequence[PackedRow]) -> dict[str, Any]:
        """One step over the rows of this data parallel rank; each is a micro batch.

        Returns:
            On every rank the same: loss (a mean over trained tokens of all data parallel ranks),
            gradient norm (infinite where fp16 overflowed, and the step is skipped), the routers'
            losses, counts of tokens, trained tokens, samples and dropped samples over all data
            parallel ranks, and the largest memory of a rank.
        """
        with megatron_cpu.suspended():
            counts = counts_of(batch, group=parallel_state.get_data_parallel_group())
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            scale = float(self.optimizer.get_loss_scale())  # of this step; the update may change it
        if self.router_losses is not None:
            self.router_losses.weigh(tokens=counts["tokens"], loss_tokens=counts["loss_tokens"])
        parts = self._forward_backward(batch, forward_only=False)
        with megatron_cpu.suspended():
            updated, grad_norm, _ = self.optimizer.step()
            total, memory = _over_all_ranks(parts)
        outcome = {
            "loss": total / max(counts["loss_tokens"], 1),
            "grad_norm": math.inf if grad_norm is None else float(grad_norm),
            "updated": bool(updated),
            LARGEST_MEMORY: memory,
            **counts,
        }
        if self.chunks[0].config.fp16:
            outcome["loss_scale"] = scale
        if self.router_losses is not None:
            outcome |= self.router_losses.collect(num_micro_batches=len(batch))
        return outcome

    @torch.no_grad()
    def losses(self, batch: Sequence[PackedRow]) -> tuple[float, int]:
        """Sum of the losses and number of the trained tokens of all ranks; nothing is updated."""
        counts = counts_of(batch, group=parallel_state.get_data_parallel_group())
        for chunk in self.chunks:
            chunk.eval()
        parts = self._forward_backward(batch, forward_only=True)
        for chunk in self.chunks:
            chunk.train()
        total, _ = _over_all_ranks(parts)
        return total, counts["loss_tokens"]

    def _forward_backward(self, batch: Sequence[PackedRow], *, forward_only: bool) -> list[Tensor]:
        """Sums of losses by micro batch, on the last pipeline stage."""
        rows = [iter(batch) for _ in self.chunks]
        parts: list[Tensor] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=rows if len(rows) > 1 else rows[0],
            model=self.chunks,
            num_microbatches=len(batch),
            seq_length=max(len(row.input_ids) for row in batch),
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return parts


def forward_step(
    rows: Iterator[PackedRow], model: torch.nn.Module
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
    """Megatron's forward step: per-token losses of a row, and how to sum them."""
    row = next(rows)
    place = megatron_cpu.device()
    losses = model(
        row.input_ids.to(place)[None],
        row.position_ids.to(place)[:, None],
        None,
        labels=row.labels.to(place)[None],
        packed_seq_params=packed_seq_params(row),
        is_padding_BS=_is_padding(row),
        **{name: value.to(place) for name, value in row.vision.items()},
    )
    return losses, partial(_sum_losses, own_part(row.loss_scale.to(place)[None], dim=1))


def packed_seq_params(row: PackedRow) -> RowParams:
    """Where the samples of a row begin, for PackedAttention."""
    seqlens = row.cu_seqlens.to(megatron_cpu.device())
    longest = int(row.cu_seqlens.diff().max())
    return RowParams(
        qkv_format="sbhd",  # rotary positions are explicit, so rows stay [S, 1, …]
        cu_seqlens_q=seqlens,
        cu_seqlens_kv=seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _is_padding(row: PackedRow) -> Tensor:
    """[1, S]."""
    return (torch.arange(len(row.input_ids)) >= num_real(row)).to(megatron_cpu.device())[None]


def _sum_losses(weights: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum and count over the trained tokens: Megatron divides by the count over all ranks."""
    total = (losses * weights).sum()
    return total, (weights > 0).sum().to(torch.int), total.detach()


def _over_all_ranks(parts: Sequence[Tensor]) -> tuple[float, float]:
    """The sum of what the last pipeline stages of all data and context parallel ranks hold, and the
    largest memory of a rank; tensor parallel ranks hold the same parts, of which one counts."""
    total = torch.zeros(1, dtype=torch.float64, device=megatron_cpu.device())
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        for part in parts:
            total += part.double()
    total, memory = sums_and_memory(total)
    return float(total), memory
