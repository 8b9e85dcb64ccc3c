"""Freeze groups on a model: which parameters train, and the table that says so."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    apply_factories,
    is_main_replica,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from vlmcore import megatron_cpu
from vlmcore.families import Family, FreezeGroup
from vlmcore.families.shell import VISION_PREFIX
from vlmcore.models.build import sharded_state_dict
from vlmcore.recipe.train_stage import TrainStage
from vlmcore.training.freeze_groups import (
    GROUPS,
    frozen_groups,
    require_match,
    require_trainable,
)


def freeze_group(parameter: str, family: Family) -> FreezeGroup:
    """The group of a parameter of the Megatron model, by its name there."""
    if family.vision is not None and parameter.startswith(VISION_PREFIX):
        return family.group_of("model." + parameter.removeprefix(VISION_PREFIX))
    return "llm"


def apply_freezes(model: nn.Module, family: Family, stage: TrainStage) -> None:
    """Sets `requires_grad` of a chunk's parameters by group and `trainable_parameters_regex`."""
    frozen = frozen_groups(stage)
    pattern = stage.trainable_parameters_regex
    for name, local_name, parameter in named_globally(model):
        picked = bool(pattern) and re.search(pattern, name) is not None
        parameter.requires_grad_(picked or not frozen[freeze_group(local_name, family)])


def require_training(chunks: Sequence[MegatronModule], family: Family, stage: TrainStage) -> None:
    """Refuses freezes that leave nothing, and a regex that matches nothing; call on every rank.

    Raises:
        TrainError: Says which.
    """
    if stage.trainable_parameters_regex:
        here = [name for chunk in chunks for name, _, _ in named_globally(chunk)]
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, here)
        require_match(sorted(set().union(*everywhere)), stage)
    require_trainable(trainable_table(chunks, family), stage)


def named_globally(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Parameters with their names in the whole model, and on this pipeline stage."""
    numbers = {
        f"{name}.": f"{name.rpartition('.')[0]}.{module.layer_number - 1}."
        for name, module in model.named_modules()
        if isinstance(module, TransformerLayer)
    }
    for name, parameter in model.named_parameters():
        here = next((prefix for prefix in numbers if name.startswith(prefix)), None)
        yield (name if here is None else numbers[here] + name.removeprefix(here)), name, parameter


def trainable_table(chunks: Sequence[MegatronModule], family: Family) -> dict[str, dict[str, int]]:
    """{group: {parameters, trainable}} of the whole model, without copies; call on every rank."""
    counts = torch.zeros(len(GROUPS), 2, dtype=torch.int64)
    for chunk in chunks:
        parameters = dict(chunk.named_parameters())
        for name, entry in sharded_state_dict(chunk).items():
            if name not in parameters:
                continue
            number = _elements_held_first(entry)
            row = counts[GROUPS.index(freeze_group(name, family))]
            row += torch.tensor([number, number * parameters[name].requires_grad])
    everyone = counts.to(megatron_cpu.device())
    dist.all_reduce(everyone)
    return {
        group: {"parameters": all_of, "trainable": trained}
        for group, (all_of, trained) in zip(GROUPS, everyone.tolist(), strict=True)
        if all_of
    }


def _elements_held_first(entry: Any) -> int:
    """Elements of a parameter that this rank holds and no rank before it."""
    state = {"entry": entry}
    apply_factories(state)
    return sum(
        torch.Size(part.local_shape).numel()
        for part in nested_values(state)
        if isinstance(part, ShardedTensor) and is_main_replica(part.replica_id)
    )
