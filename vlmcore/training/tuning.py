"""The adapters of a LoRA stage: where they go, and what becomes of them at the end."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule

from vlmcore.families import Family
from vlmcore.models.lora import apply_lora, load_adapter, merge_lora, save_adapter
from vlmcore.recipe.train_stage import TrainStage
from vlmcore.training.freeze_groups import adapter_config, frozen_groups
from vlmcore.training.freezing import freeze_group
from vlmcore.weights.adapter_plan import AdapterPlan, plan_adapters
from vlmcore.weights.adapters import FreshAdapter, McoreAdapter, write_peft


def plan_lora(stage: TrainStage, hf_dir: Path) -> AdapterPlan:
    """The adapters that a stage asks for, from the model's config alone.

    Raises:
        TrainError: A name in target_modules matches no linear layer of an unfrozen group.
    """
    return plan_adapters(hf_dir, adapter_config(stage, hf_dir))


def adapt(
    modules: Sequence[MegatronModule], plan: AdapterPlan, stage: TrainStage, family: Family
) -> None:
    """Puts untrained adapters onto a loaded model; beside them only what `lora_llm` trains."""
    apply_lora(modules, plan)
    load_adapter(modules, FreshAdapter(plan, seed=stage.seed))
    if stage.tuner_type != "lora_llm":
        return
    frozen = frozen_groups(stage)
    for module in modules:
        for name, parameter in module.named_parameters():
            group = freeze_group(name, family)
            if group != "llm":
                parameter.requires_grad_(not frozen[group])


def save_and_merge(
    modules: Sequence[MegatronModule], plan: AdapterPlan, target: Path, *, hf_dir: Path, work: Path
) -> None:
    """Writes the adapters as peft's folder, then adds them to the weights; call on every rank.

    Args:
        modules: This rank's chunks.
        plan: What `adapt` took.
        target: New folder of the adapter.
        hf_dir: Folder with the model's config.json.
        work: Scratch folder for what stands between.
    """
    if dist.get_rank() == 0:
        shutil.rmtree(work, ignore_errors=True)  # of a build that was killed here
    dist.barrier()
    save_adapter(modules, plan, work)
    if dist.get_rank() == 0:
        write_peft(McoreAdapter(hf_dir, work), target)
    dist.barrier()
    merge_lora(modules)
