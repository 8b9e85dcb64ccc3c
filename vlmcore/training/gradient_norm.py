"""The norm of all gradients, and clipping by it: a few calls, however many tensors there are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from vlmcore import megatron_cpu


def grad_norm(grads: Sequence[Tensor], *, group: dist.ProcessGroup | None = None) -> float:
    """The 2-norm over the gradients of all ranks of a group.

    Args:
        grads: This rank's.
        group: None: all ranks.
    """
    total = torch.zeros((), device=megatron_cpu.device())
    if grads:
        total += torch.stack(torch._foreach_norm(list(grads))).square().sum()
    dist.all_reduce(total, group=group)
    return float(total) ** 0.5


def clip(grads: Sequence[Tensor], *, max_norm: float, total_norm: float) -> None:
    """Scales gradients so that their norm, now `total_norm`, is `max_norm` at most."""
    scale = max_norm / (total_norm + 1e-6)
    if scale < 1 and grads:
        torch._foreach_mul_(list(grads), scale)
