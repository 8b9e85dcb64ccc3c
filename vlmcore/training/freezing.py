"""Freeze groups on a model: which parameters train, and the table that says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from vlmcore.errors import TrainError
from vlmcore.families import Family, FreezeGroup
from vlmcore.families.shell import VISION_PREFIX
from vlmcore.recipe.schema import TrainStage


def freeze_group(parameter: str, family: Family) -> FreezeGroup:
    """The group of a parameter of the Megatron model, by its name there."""
    if family.vision is not None and parameter.startswith(VISION_PREFIX):
        return family.group_of("model." + parameter.removeprefix(VISION_PREFIX))
    return "llm"


def apply_freezes(model: nn.Module, family: Family, stage: TrainStage) -> dict[str, Any]:
    """Sets `requires_grad` by group; gives {group: {parameters, trainable}} of this rank.

    Raises:
        TrainError: Nothing is left to train.
    """
    frozen: Mapping[FreezeGroup, bool] = {
        "vit": stage.freeze_vit,
        "aligner": stage.freeze_aligner,
        "llm": stage.freeze_llm,
    }
    table: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        group = freeze_group(name, family)
        parameter.requires_grad_(not frozen[group])
        row = table.setdefault(group, {"parameters": 0, "trainable": 0})
        row["parameters"] += parameter.numel()
        row["trainable"] += parameter.numel() if parameter.requires_grad else 0
    if not any(row["trainable"] for row in table.values()):
        raise TrainError(
            f"train.{stage.name}: nothing is trainable: the model has {', '.join(sorted(table))}, "
            f"all frozen; set one of freeze_vit, freeze_aligner, freeze_llm to false"
        )
    return dict(sorted(table.items()))
