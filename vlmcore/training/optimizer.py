"""Megatron's optimizer and schedule, on an AdamW that its distributed optimizer can shard.

Without TransformerEngine and Apex, Megatron-Core 0.16 falls back to torch's AdamW, whose per-tensor
`step` its distributed optimizer cannot save. `GroupStepAdam` keeps `step` in the parameter group,
as the fused optimizers do. It ends when Megatron saves torch's AdamW.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from vlmcore.recipe.schema import TrainStage


class GroupStepAdam(torch.optim.Optimizer):
    """AdamW with `step` in the parameter group and only the two moments as state.

    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **_: Any,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = int(group.get("step", 0)) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        for p in params:
            if "exp_avg" not in self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        weights = [p.data for p in params]
        grads: Any = [p.grad for p in params]
        first = [self.state[p]["exp_avg"] for p in params]
        second = [self.state[p]["exp_avg_sq"] for p in params]
        (beta1, beta2), step = group["betas"], group["step"]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        scale = torch._foreach_sqrt(second)
        torch._foreach_div_(scale, (1 - beta2**step) ** 0.5)
        torch._foreach_add_(scale, group["eps"])
        torch._foreach_addcdiv_(weights, first, scale, -group["lr"] / (1 - beta1**step))


def build_optimizer(model: DistributedDataParallel, stage: TrainStage) -> MegatronOptimizer:
    """The distributed optimizer of a stage over the unfrozen parameters."""
    _teach_megatron()
    bf16 = stage.torch_dtype == "bfloat16"
    config = OptimizerConfig(
        optimizer="adam",
        lr=stage.learning_rate,
        min_lr=stage.min_lr,
        weight_decay=stage.weight_decay,
        adam_beta1=stage.adam_beta1,
        adam_beta2=stage.adam_beta2,
        adam_eps=stage.adam_eps,
        clip_grad=stage.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
    )
    return get_megatron_optimizer(config, [model])


def build_schedule(optimizer: MegatronOptimizer, stage: TrainStage) -> OptimizerParamScheduler:
    """Warm-up, then the stage's decay down to `min_lr` at the last step."""
    warmup = min(round(stage.lr_warmup_fraction * stage.train_iters), stage.train_iters - 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=stage.learning_rate,
        min_lr=stage.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=stage.train_iters,
        lr_decay_style=stage.lr_decay_style,
        start_wd=stage.weight_decay,
        end_wd=stage.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def _teach_megatron() -> None:
    """Puts GroupStepAdam where Megatron looks for a fused Adam, unless there is one."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    package: Any = optimizer
    sharded: Any = distrib_optimizer
    if not package.USING_PYTORCH_OPTIMIZER:
        return
    package.Adam = sharded.Adam = GroupStepAdam
    package.USING_PYTORCH_OPTIMIZER = False
    sharded.HAVE_APEX_OR_TE = sharded.USING_APEX_OPTIMIZER = True
