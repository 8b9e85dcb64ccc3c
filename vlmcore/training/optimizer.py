"""Megatron's optimizer and schedule, on an AdamW that its distributed optimizer can shard.

Without TransformerEngine and Apex, Megatron-Core 0.16 falls back to torch's AdamW, whose per-tensor
`step` its distributed optimizer cannot save. `GroupStepAdam` keeps `step` in the parameter group,
as the fused optimizers do. It ends when Megatron saves torch's AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from vlmcore.families import Family, FreezeGroup
from vlmcore.recipe.train_stage import TrainStage
from vlmcore.training import bucket_padding
from vlmcore.training.bound_optimizer import BoundOptimizer
from vlmcore.training.freeze_groups import group_rates
from vlmcore.training.freezing import freeze_group
from vlmcore.training.loss_scale import SharedGradScaler
from vlmcore.training.schedule import warmup_steps


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
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            if "exp_avg" not in state:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        beta1, beta2 = group["betas"]
        grads: Any = [p.grad for p in params]
        step = torch.full((), group["step"], dtype=torch.float32, device=params[0].device)
        torch._fused_adamw_(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [step] * len(params),
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


class Schedule(OptimizerParamScheduler):
    """Megatron's schedule, but no step of the warm-up is wasted on a rate of 0.

    Megatron-Core 0.16 gives step k of w the rate (k − 1) / w of the peak; here it is k / (w + 1).
    """

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """Rate of a parameter group at the step that comes next."""
        if self.num_steps < self.lr_warmup_steps:
            peak: Any = param_group.get("max_lr", self.max_lr)
            return float(peak) * (self.num_steps + 1) / (self.lr_warmup_steps + 1)
        rate: float = super().get_lr(param_group)
        return rate


def build_optimizer(
    chunks: Sequence[DistributedDataParallel], stage: TrainStage, family: Family
) -> MegatronOptimizer:
    """The distributed optimizer of a stage over the trainable parameters.

    Biases and norms do not decay; groups with a rate of their own reach `min_lr` in proportion.
    """
    _teach_megatron(offloads=stage.optimizer_cpu_offload)
    bucket_padding.install()
    config = OptimizerConfig(
        optimizer="adam",
        lr=stage.learning_rate,
        min_lr=stage.min_lr,
        weight_decay=stage.weight_decay,
        adam_beta1=stage.adam_beta1,
        adam_beta2=stage.adam_beta2,
        adam_eps=stage.adam_eps,
        clip_grad=stage.clip_grad,
        bf16=stage.torch_dtype == "bfloat16",
        fp16=stage.torch_dtype == "float16",
        params_dtype=getattr(torch, stage.torch_dtype),
        initial_loss_scale=stage.initial_loss_scale,
        min_loss_scale=stage.min_loss_scale,
        loss_scale_window=stage.loss_scale_window,
        hysteresis=stage.hysteresis,
        use_distributed_optimizer=True,
        overlap_param_gather=stage.overlap_param_gather,
        optimizer_cpu_offload=stage.optimizer_cpu_offload,
        optimizer_offload_fraction=stage.optimizer_offload_fraction,
        overlap_cpu_optimizer_d2h_h2d=True,
    )
    if stage.optimizer_cpu_offload:
        # The hybrid optimizer's weights and checkpoints go by these. Set here, since the config of
        # 0.16 compares TransformerEngine's version before it asks whether it is there.
        config.use_precision_aware_optimizer = True
        config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
    overrides: Any = get_standard_config_overrides(config)
    for group, rate in group_rates(stage).items():
        if rate is not None:
            ratio = rate / stage.learning_rate
            # a checkpoint tells groups of parameters apart by lr_mult
            override = {"max_lr": rate, "min_lr": stage.min_lr * ratio, "lr_mult": ratio}
            overrides[_key_of(group, family)] = override
    chained = get_megatron_optimizer(config, list(chunks), config_overrides=overrides)
    parts = chained.chained_optimizers
    for part in parts:
        if part.init_state_fn is not None:  # a checkpoint may come before the first update
            part.init_state_fn(part.optimizer, config)
    if config.fp16:
        scaler = SharedGradScaler(config, num_optimizers=len(parts))
        for part in parts:
            part.grad_scaler = scaler
    return BoundOptimizer(parts)


def _key_of(group: FreezeGroup, family: Family) -> ParamKey:
    """What Megatron asks about each parameter."""

    def belongs(_: torch.nn.Parameter, name: str) -> bool:
        return freeze_group(name.removeprefix("module."), family) == group

    return ParamKey(with_name_predicate=ParamWithNamePredicate(name=group, fn=belongs))


def build_schedule(optimizer: MegatronOptimizer, stage: TrainStage) -> Schedule:
    """Warm-up, then the stage's decay down to `min_lr` at the last step."""
    return Schedule(
        optimizer,
        init_lr=0.0,
        max_lr=stage.learning_rate,
        min_lr=stage.min_lr,
        lr_warmup_steps=warmup_steps(stage),
        lr_decay_steps=stage.train_iters,
        lr_decay_style=stage.lr_decay_style,
        start_wd=stage.weight_decay,
        end_wd=stage.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        wsd_decay_steps=stage.lr_wsd_decay_iters,
        lr_wsd_decay_style=stage.lr_wsd_decay_style,
    )


class HostAdamW(torch.optim.AdamW):
    """What updates offloaded parameters; Megatron tells it from the device's by its class."""


def _teach_megatron(*, offloads: bool) -> None:
    """Puts GroupStepAdam where Megatron looks for a fused Adam, unless there is one.

    Beside offloaded parameters the rest is torch's too: after a resume the hybrid optimizer of 0.16
    would set a `step` of the group back before every update.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    package: Any = optimizer
    sharded: Any = distrib_optimizer
    if package.USING_PYTORCH_OPTIMIZER:
        package.Adam = sharded.Adam = GroupStepAdam
        package.USING_PYTORCH_OPTIMIZER = False
        sharded.HAVE_APEX_OR_TE = sharded.USING_APEX_OPTIMIZER = True
    if offloads:
        package.Adam, package.CPUAdam = torch.optim.AdamW, HostAdamW
        # the hybrid optimizer has both classes in its groups, and so in checkpoints
        torch.serialization.add_safe_globals([torch.optim.AdamW, HostAdamW])
