"""The adapters of a LoRA stage: where they go, and what becomes of them at the end."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule
from torch import nn

from vlmcore.errors import TrainError
from vlmcore.families import Family, family_of, read_config
from vlmcore.models.lora import apply_lora, load_adapter, merge_lora, save_adapter
from vlmcore.recipe.train_stage import TrainStage
from vlmcore.training.freezing import freeze_group, frozen_groups
from vlmcore.weights.adapter_plan import AdapterPlan, plan_adapters
from vlmcore.weights.adapters import FreshAdapter, McoreAdapter, write_peft

ALL_LINEAR = "all-linear"
_NUMBER = re.compile(r"\\\.\d+\\\.")


def plan_lora(stage: TrainStage, hf_dir: Path) -> AdapterPlan:
    """The adapters that a stage asks for, from the model's config alone.

    Raises:
        TrainError: A name in target_modules matches no linear layer of an unfrozen group.
    """
    from peft import LoraConfig

    linear, experts = _candidates(stage, hf_dir)
    chosen = {*linear, *experts}
    if stage.target_modules and ALL_LINEAR not in stage.target_modules:
        matches = {
            target: {name for name in chosen if f".{name}".endswith(f".{target}")}
            for target in stage.target_modules
        }
        if lost := [target for target, names in matches.items() if not names]:
            raise TrainError(
                f"train.{stage.name}: target_modules: {', '.join(lost)}: no linear layer of an "
                f"unfrozen group is called so; there are: "
                f"{', '.join(sorted({name.rpartition('.')[2] for name in chosen}))}"
            )
        chosen = set().union(*matches.values())
    # layers' numbers left out: one pattern for all of them
    patterns = {_NUMBER.sub(r"\\.\\d+\\.", re.escape(name)) for name in chosen & {*linear}}
    config = LoraConfig(
        r=stage.lora_rank,
        lora_alpha=stage.lora_alpha,
        use_rslora=stage.use_rslora,
        target_modules="|".join(sorted(patterns)) or None,
        target_parameters=sorted({re.split(r"\.\d+\.", name)[-1] for name in chosen & {*experts}}),
    )
    return plan_adapters(hf_dir, config)


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


def _candidates(stage: TrainStage, hf_dir: Path) -> tuple[list[str], list[str]]:
    """HF names of linear layers, and of stacked experts, that may get an adapter."""
    import transformers

    family = family_of(read_config(hf_dir))
    config = transformers.AutoConfig.from_pretrained(hf_dir)
    with torch.device("meta"):
        model = getattr(transformers, family.architecture)(config)
    frozen = frozen_groups(stage)
    llm_alone = stage.tuner_type == "lora_llm" or not stage.target_modules

    def may(name: str) -> bool:
        group = family.group_of(name)
        wanted = group == "llm" or not llm_alone
        return wanted and not frozen[group] and not name.startswith("lm_head")

    linear = [n for n, module in model.named_modules() if type(module) is nn.Linear]
    experts = [n for n, weight in model.named_parameters() if ".experts." in n and weight.ndim == 3]
    return [n for n in linear if may(f"{n}.weight")], [n for n in experts if may(n)]
