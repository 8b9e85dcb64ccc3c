"""A stage's model as it is trained: built, frozen, loaded, wrapped, with optimizer and schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
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
from vlmcore.dataloading.samples import PackedRow
from vlmcore.errors import TrainError
from vlmcore.families import family_of, read_config
from vlmcore.models.build import build_model
from vlmcore.models.fit import require_layout
from vlmcore.models.folder import load_folder, save_folder
from vlmcore.models.vision import unreached_weights
from vlmcore.models.vision_language import VisionLanguageModel
from vlmcore.recipe.train_stage import TrainStage
from vlmcore.training import finalize, torch_dist_state
from vlmcore.training.engine import Saving
from vlmcore.training.freezing import apply_freezes, require_training, trainable_table
from vlmcore.training.job import ADAPTER, TrainJob
from vlmcore.training.optimizer import build_optimizer, build_schedule
from vlmcore.training.router_losses import RouterLosses
from vlmcore.training.step import TrainStep
from vlmcore.training.tuning import adapt, plan_lora, save_and_merge
from vlmcore.weights.adapter_plan import AdapterPlan
from vlmcore.weights.sidecar import config_dir


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
    train_step: TrainStep
    trainable: dict[str, dict[str, int]]
    plan: AdapterPlan | None
    stage: TrainStage

    def gather_weights(self) -> None:
        """Waits for what other ranks updated; call on every rank before weights are read."""
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)

    @property
    def learning_rate(self) -> float:
        """Of the next step: the stage's own, or a group's where each has one."""
        groups = self.optimizer.param_groups
        shared = get_canonical_lr_for_logging(groups)
        return float(groups[0]["lr"] if shared is None else shared)

    @property
    def data_parallel_rank(self) -> int:
        """Which part of the data this rank reads."""
        return int(parallel_state.get_data_parallel_rank())

    @property
    def data_parallel_size(self) -> int:
        """How many ranks read different data."""
        return int(parallel_state.get_data_parallel_world_size())

    @property
    def leads_replica(self) -> bool:
        """Whether this rank is the first of those that read the same data."""
        return not (
            parallel_state.get_tensor_model_parallel_rank()
            or parallel_state.get_pipeline_model_parallel_rank()
            or parallel_state.get_context_parallel_rank()
        )

    def step(self, batch: Sequence[PackedRow]) -> dict[str, Any]:
        """One optimizer step, and one of the schedule unless it was skipped; see `TrainStep`."""
        outcome = self.train_step(batch)
        if outcome["updated"]:
            self.schedule.step(increment=1)
        return outcome

    def evaluate(self, batch: Sequence[PackedRow]) -> tuple[float, int]:
        """Sum of the losses and number of the trained tokens of all ranks; nothing is updated."""
        self.gather_weights()
        return self.train_step.losses(batch)

    def keep_weights(self, folder: Path) -> None:
        """Writes trained weights alone into a folder."""
        self.gather_weights()
        torch_dist_state.save_weights(self, folder)

    def take_weights(self, folder: Path) -> None:
        """Puts them into the model, not into the optimizer: nothing is trained from there."""
        torch_dist_state.load_weights(self, folder)

    def save_state(self, folder: Path) -> Saving | None:
        """Writes trained weights, optimizer and schedule into a checkpoint's folder."""
        self.gather_weights()
        return torch_dist_state.save_state(self, folder)

    def load_state(self, folder: Path) -> None:
        """Takes them from there, at any layout."""
        torch_dist_state.load_state(self, folder)

    def write(self, job: TrainJob) -> None:
        """Writes the trained model folder in the form of the one that the job started from."""
        self.gather_weights()
        if self.plan is not None:
            save_and_merge(
                self.modules,
                self.plan,
                job.output_dir / ADAPTER,
                hf_dir=job.hf_dir,
                work=job.scratch_dir / ADAPTER,
            )
        save_folder(self.modules, job.output_dir, like=job.model_dir)


def prepare(
    stage: TrainStage, model_dir: Path, *, idle_inputs: Mapping[str, Tensor] | None = None
) -> Training:
    """Everything but the data; call inside `model_parallel` on every rank.

    Args:
        stage: What to train, and how.
        model_dir: Model folder to start from.
        idle_inputs: What a vision side that trains looks at where a row has no image.

    Raises:
        TrainError: The layout does not divide the model, nothing is trainable, or the stage asks
            for what the engine cannot do with this model or on this machine.
        WeightError: The folder and the model do not fit.
    """
    hf_dir = config_dir(model_dir)
    require_layout(hf_dir, stage.layout, training=True)
    family = family_of(read_config(hf_dir))
    _require_gpu(stage)
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
        require_training(modules, family, stage)
    for module in modules:
        module.to(megatron_cpu.device())
        if stage.vit_gradient_checkpointing and getattr(module, "vision_model", None) is not None:
            module.vision_model.gradient_checkpointing_enable({"use_reentrant": False})
    load_folder(modules, model_dir)
    if plan is not None:
        adapt(modules, plan, stage, family)
    for module in modules:
        if isinstance(module, VisionLanguageModel) and idle_inputs:
            _keep_reached(module, idle_inputs)
    chunks = _with_gradient_buffers(modules, stage)
    optimizer = build_optimizer(chunks, stage, family)
    config = modules[0].config
    config.grad_scale_func = optimizer.scale_loss
    finalize.install()
    config.finalize_model_grads_func = finalize_model_grads
    return Training(
        modules=modules,
        chunks=chunks,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, stage),
        train_step=TrainStep(chunks, optimizer, _router_losses(config, stage)),
        trainable=trainable_table(modules, family),
        plan=plan,
        stage=stage,
    )


def _require_gpu(stage: TrainStage) -> None:
    """Refuses to offload where there is nothing to offload from."""
    if stage.optimizer_cpu_offload and not torch.cuda.is_available():
        raise TrainError(
            f"train.{stage.name}: optimizer_cpu_offload: this machine has no CUDA device, and "
            f"Megatron-Core's hybrid optimizer moves only what lies on one, so nothing would move; "
            f"leave it out"
        )


def _keep_reached(module: VisionLanguageModel, idle_inputs: Mapping[str, Tensor]) -> None:
    """Has every trained weight of a vision side get a gradient from every row, on every rank."""
    vision = module.vision_model
    if vision is None or not any(weight.requires_grad for weight in vision.parameters()):
        return
    place, dtype = megatron_cpu.device(), module.config.params_dtype
    module.idle_inputs = {name: value.to(place) for name, value in idle_inputs.items()}
    for weight in unreached_weights(vision, module.idle_inputs, module.placeholders, dtype=dtype):
        weight.requires_grad_(False)  # else weight decay alone would move it


def _with_gradient_buffers(
    modules: Sequence[MegatronModule], stage: TrainStage
) -> list[DistributedDataParallel]:
    """The chunks in Megatron's wrapper, which reduces gradients over data parallel ranks."""
    config = modules[0].config
    chunks = [
        DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                use_distributed_optimizer=True,
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=stage.overlap_grad_reduce,
                overlap_param_gather=stage.overlap_param_gather,
                bucket_size=stage.ddp_bucket_size,
            ),
            module,
            disable_bucketing=i > 0,
        )
        for i, module in enumerate(modules)
    ]
    if stage.overlap_grad_reduce:  # only a step's last micro batch sends
        quiet = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = quiet if len(quiet) > 1 else quiet[0]
    elif all(
        weight.dtype == weight.main_grad.dtype for c in chunks for weight in c.params_with_grad
    ):
        for chunk in chunks:
            _accumulate_in_buffers(chunk)
    return chunks


def _accumulate_in_buffers(chunk: DistributedDataParallel) -> None:
    """Has backward itself add gradients to the buffers, which Megatron leaves to a Python hook of
    each weight."""
    chunk.grad_accs.clear()  # the hooks live in these nodes, which nothing else keeps
    for weight in chunk.params_with_grad:
        weight.grad = weight.main_grad


def _megatron_fields(stage: TrainStage) -> dict[str, Any]:
    """A stage's part of Megatron's TransformerConfig."""
    fields: dict[str, Any] = {
        "moe_grouped_gemm": stage.moe_grouped_gemm,
        "moe_permute_fusion": stage.moe_permute_fusion and _has_fused_permute(),
    }
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


def _has_fused_permute() -> bool:
    """Whether TransformerEngine is there with the kernels that Megatron asks of it."""
    from megatron.core.transformer.moe import moe_utils

    return bool(moe_utils.HAVE_TE) and moe_utils.fused_permute_with_probs is not None


def _router_losses(config: TransformerConfig, stage: TrainStage) -> RouterLosses | None:
    if config.num_moe_experts is None or not (stage.moe_aux_loss_coeff or stage.moe_z_loss_coeff):
        return None
    return RouterLosses(
        config,
        moe_aux_loss_coeff=stage.moe_aux_loss_coeff,
        moe_z_loss_coeff=stage.moe_z_loss_coeff,
    )
