"""A stage's model as it is trained: built, frozen, loaded, wrapped, with optimizer and schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import (
    OptimizerParamScheduler,
    get_canonical_lr_for_logging,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from vlmcore import megatron_cpu
from vlmcore.families import family_of, read_config
from vlmcore.models.build import build_model
from vlmcore.models.fit import require_layout
from vlmcore.models.folder import config_dir, load_folder
from vlmcore.recipe.train_stage import TrainStage
from vlmcore.training.freezing import apply_freezes, require_trainable, trainable_table
from vlmcore.training.optimizer import build_optimizer, build_schedule
from vlmcore.training.router_losses import RouterLosses
from vlmcore.training.step import TrainStep
from vlmcore.training.tuning import adapt, plan_lora
from vlmcore.weights.adapter_plan import AdapterPlan


@dataclass(frozen=True)
class Training:
    """What a stage trains on this rank.

    Attributes:
        modules: The model's chunks themselves.
        chunks: The same with their gradient buffers.
        trainable: {group: {parameters, trainable}} of the whole model.
        plan: Of the adapters; None where weights themselves train.
    """

    modules: list[MegatronModule]
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    step: TrainStep
    trainable: dict[str, dict[str, int]]
    plan: AdapterPlan | None

    @property
    def learning_rate(self) -> float:
        """Of the next step: the stage's own, or a group's where each has one."""
        groups = self.optimizer.param_groups
        shared = get_canonical_lr_for_logging(groups)
        return float(groups[0]["lr"] if shared is None else shared)


def prepare(
    stage: TrainStage, model_dir: Path, *, idle_inputs: Mapping[str, Tensor] | None = None
) -> Training:
    """Everything but the data; call inside `model_parallel` on every rank.

    Args:
        stage: What to train, and how.
        model_dir: Model folder to start from.
        idle_inputs: What a vision side that trains looks at where a row has no image.

    Raises:
        TrainError: The layout does not divide the model, or nothing is trainable.
        WeightError: The folder and the model do not fit.
    """
    hf_dir = config_dir(model_dir)
    require_layout(hf_dir, stage.layout, training=True)
    family = family_of(read_config(hf_dir))
    plan = None if stage.tuner_type == "full" else plan_lora(stage, hf_dir)
    modules = build_model(
        hf_dir,
        layout=stage.layout,
        params_dtype=getattr(torch, stage.torch_dtype),
        **_megatron_fields(stage),
    )
    if plan is None:  # before anything is loaded
        for module in modules:
            apply_freezes(module, family, stage)
        require_trainable(trainable_table(modules, family), stage)
    for module in modules:
        module.to(megatron_cpu.device())
        if stage.vit_gradient_checkpointing and getattr(module, "vision_model", None) is not None:
            module.vision_model.gradient_checkpointing_enable({"use_reentrant": False})
    load_folder(modules, model_dir)
    if plan is not None:
        adapt(modules, plan, stage, family)
    for module in modules:
        vision = getattr(module, "vision_model", None)
        if vision is not None and any(weight.requires_grad for weight in vision.parameters()):
            place = megatron_cpu.device()
            module.idle_inputs = {k: v.to(place) for k, v in (idle_inputs or {}).items()}
    chunks = [
        DistributedDataParallel(
            module.config,
            DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
            module,
            disable_bucketing=i > 0,
        )
        for i, module in enumerate(modules)
    ]
    optimizer = build_optimizer(chunks, stage, family)
    config = modules[0].config
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    return Training(
        modules=modules,
        chunks=chunks,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, stage),
        step=TrainStep(chunks, optimizer, _router_losses(config, stage)),
        trainable=trainable_table(modules, family),
        plan=plan,
    )


def _megatron_fields(stage: TrainStage) -> dict[str, Any]:
    """A stage's part of Megatron's TransformerConfig."""
    fields: dict[str, Any] = {}
    if stage.moe_aux_loss_coeff:
        fields["moe_router_load_balancing_type"] = "aux_loss"
    if stage.recompute_granularity == "full":
        fields |= {
            "recompute_granularity": "full",
            "recompute_method": stage.recompute_method,
            "recompute_num_layers": stage.recompute_num_layers,
        }
    elif stage.recompute_granularity == "selective":
        fields |= {
            "recompute_granularity": "selective",
            "recompute_modules": list(stage.recompute_modules),
        }
    return fields


def _router_losses(config: TransformerConfig, stage: TrainStage) -> RouterLosses | None:
    if config.num_moe_experts is None or not (stage.moe_aux_loss_coeff or stage.moe_z_loss_coeff):
        return None
    return RouterLosses(
        config,
        moe_aux_loss_coeff=stage.moe_aux_loss_coeff,
        moe_z_loss_coeff=stage.moe_z_loss_coeff,
    )
