"""Megatron's gradient norm and clipping without Apex: a few calls over all gradients.

Megatron-Core 0.16 goes tensor by tensor where neither Apex nor TransformerEngine is installed, a
dozen calls for each. It ends when Megatron falls back to torch's `_foreach` functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vlmcore import megatron_cpu


def install() -> None:
    """Teaches Megatron's optimizers, unless a fused implementation is there; may come again."""
    from megatron.core.optimizer import clip_grads, optimizer

    fallback: Any = clip_grads
    if fallback.l2_norm_impl.__module__ != "megatron.core.utils":
        return
    module: Any = optimizer
    module.get_grad_norm_fp32 = grad_norm
    module.clip_grad_by_total_norm_fp32 = clip


def grad_norm(
    grads: Sequence[Tensor],
    norm_type: float = 2.0,
    grad_stats_parallel_group: dist.ProcessGroup | None = None,
) -> float:
    """The 2-norm over the gradients of all ranks of a group.

    Args:
        grads: This rank's.
        norm_type: 2, which is all that Megatron's optimizers ask for.
        grad_stats_parallel_group: The group.
    """
    assert norm_type == 2
    total = torch.zeros((), device=megatron_cpu.device())
    if grads:
        total += torch.stack(torch._foreach_norm(list(grads))).square().sum()
    dist.all_reduce(total, group=grad_stats_parallel_group)
    return float(total) ** 0.5


def clip(
    parameters: Sequence[Tensor],
    max_norm: float,
    total_norm: float,
    use_decoupled_grad: bool = False,
) -> None:
    """Scales gradients so that their norm, now `total_norm`, is `max_norm` at most."""
    name = "decoupled_grad" if use_decoupled_grad else "grad"
    found = (getattr(parameter, name, None) for parameter in parameters)
    grads = [grad.detach() for grad in found if grad is not None]
    scale = max_norm / (total_norm + 1e-6)
    if scale < 1 and grads:
        torch._foreach_mul_(grads, scale)
