"""Megatron's distributed optimizers, with what never changes between steps looked up once.

Megatron-Core 0.16 finds in every step anew, parameter by parameter, which piece of a gradient
buffer belongs to which shard, and copies each fp32 shard onto itself. The buffers stay where they
are for as long as the model is trained, so here the shards' gradients are bound to their pieces
when the optimizer is built. Ends when Megatron's own step costs no Python for each parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from vlmcore.training.gradient_norm import clip, grad_norm

# A norm sums a tensor's squares one after another in fp32: 1e8 of them at once are 1 % off on a
# CPU, in pieces of this size 1e-6.
LONGEST = 2**18


class BoundOptimizer(ChainedOptimizer):
    """One update of what several distributed optimizers hold; state and checkpoints are Megatron's.

    Args:
        parts: Megatron's optimizers over gradient buffers in fp32. Those without parameters on this
            rank take part in what all ranks do together.
    """

    def __init__(self, parts: list[MegatronOptimizer]) -> None:
        super().__init__(parts)
        self._busy: list[Any] = [part for part in parts if not part.is_stub_optimizer]
        self._grads = joined([grad for part in self._busy for grad in _bind(part)])
        self._weights = [pair for part in self._busy for pair in _half_weights(part)]
        # each gradient once: tensor parallel ranks hold some in common
        counted = (grad for part in self._busy for grad in part.get_main_grads_for_grad_norm())
        self._counted = joined(counted)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: gradients stay bound to the buffers, which their model chunks set to zero."""

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Divides gradients by the loss scale, where there is one; whether any overflowed."""
        for part in self._busy:
            if _offloads(part):  # loading a checkpoint makes a hybrid optimizer drop its gradients
                part._copy_model_grads_to_main_grads()
        found = False
        for part in self.chained_optimizers:
            if part.grad_scaler is not None:
                overflowed = part._unscale_main_grads_and_check_for_nan()
                part.grad_scaler.update(overflowed)
                found |= overflowed
        return found

    @torch.no_grad()
    def get_grad_norm(self) -> float:
        """Of the gradients of all ranks."""
        return grad_norm(self._counted, group=self.get_grad_stats_parallel_group())

    @torch.no_grad()
    def step(self) -> tuple[bool, float | None, None]:
        """Whether there was an update, not where fp16 overflowed; the norm of the gradients."""
        if self.prepare_grads():
            return False, None, None
        norm = self.get_grad_norm()
        if self.config.clip_grad > 0:
            clip(self._grads, max_norm=self.config.clip_grad, total_norm=norm)
        return self.step_with_ready_grads(), norm, None

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """The update, and its way to the other data parallel ranks unless that is overlapped."""
        for part in self._busy:
            part.optimizer.step()
        if self._weights:
            model, main = zip(*self._weights, strict=True)
            torch._foreach_copy_(model, main)
        if not self.config.overlap_param_gather:
            for chunk in self.model_chunks:
                chunk.start_param_sync()
        return True


def joined(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Flat views of the same elements: what lies side by side in memory is one, up to LONGEST."""
    runs: list[Tensor] = []
    for tensor in sorted(tensors, key=Tensor.data_ptr):
        if runs and _follows(runs[-1], tensor):
            runs[-1] = runs[-1].as_strided((len(runs[-1]) + tensor.numel(),), (1,))
        else:
            runs.append(tensor.detach().view(-1))
    return [piece for run in runs for piece in run.split(LONGEST)]


def _follows(run: Tensor, tensor: Tensor) -> bool:
    """Whether a tensor begins where a run ends; both contiguous and of one type."""
    same = run.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    return same and run.storage_offset() + len(run) == tensor.storage_offset()


def _bind(part: Any) -> list[Tensor]:
    """The gradients of an optimizer, each from now on that of its shard."""
    name = "decoupled_grad" if _offloads(part) else "grad"  # of a type unlike the shard's
    grads = []
    for model_param, shard in _shards(part):
        where = part._get_model_param_range_map(model_param)["param"]
        grad: Tensor = model_param.main_grad.view(-1)[where.start : where.end]
        assert grad.dtype == torch.float32 and len(grad) == shard.numel()
        setattr(shard, name, grad)
        grads.append(grad)
    return grads


def _shards(part: DistributedOptimizer) -> Iterator[tuple[Any, Tensor]]:
    """Parameters of the model, each with the part of it that this rank updates."""
    of_half = part.shard_float16_groups if _offloads(part) else part.shard_fp32_from_float16_groups
    yield from _pairs(part.model_float16_groups, of_half)
    yield from _pairs(part.model_fp32_groups, part.shard_fp32_groups)


def _half_weights(part: DistributedOptimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """What the model reads in half precision, each with what is updated in fp32; fp32 weights are
    updated in the model itself."""
    if not _offloads(part):  # then Megatron's hybrid optimizer copies
        yield from _pairs(part.shard_float16_groups, part.shard_fp32_from_float16_groups)


def _pairs(ones: list[list[Any]], others: list[list[Any]]) -> Iterator[tuple[Any, Any]]:
    """Members of groups, side by side."""
    for one, other in zip(ones, others, strict=True):
        yield from zip(one, other, strict=True)


def _offloads(part: DistributedOptimizer) -> bool:
    return bool(part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8)
