"""What a stage keeps frozen and where its adapters go, by freeze group, whatever the engine.

A plan asks too, so torch is imported only where a model is built.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmcore.errors import TrainError
from vlmcore.families import Family, FreezeGroup, family_of, read_config
from vlmcore.recipe.train_stage import TrainStage

if TYPE_CHECKING:
    from peft import LoraConfig

GROUPS: tuple[FreezeGroup, ...] = ("aligner", "llm", "vit")
ALL_LINEAR = "all-linear"
_NUMBER = re.compile(r"\\\.\d+\\\.")
_STACK = re.compile(r"\.\d+\.")  # a layer's number


def frozen_groups(stage: TrainStage) -> Mapping[FreezeGroup, bool]:
    """Which groups a stage keeps as they are."""
    return {"vit": stage.freeze_vit, "aligner": stage.freeze_aligner, "llm": stage.freeze_llm}


def group_rates(stage: TrainStage) -> Mapping[FreezeGroup, float | None]:
    """Peak learning rates of groups that have one of their own."""
    return {"vit": stage.vit_lr, "aligner": stage.aligner_lr, "llm": None}


def require_trainable(table: Mapping[str, Mapping[str, int]], stage: TrainStage) -> None:
    """Refuses a stage that would change nothing.

    Raises:
        TrainError: Nothing is left to train.
    """
    if not any(row["trainable"] for row in table.values()):
        raise TrainError(
            f"train.{stage.name}: nothing is trainable: the model has {', '.join(sorted(table))}, "
            f"all frozen; set one of freeze_vit, freeze_aligner, freeze_llm to false"
        )


def require_match(names: Sequence[str], stage: TrainStage) -> None:
    """Refuses a `trainable_parameters_regex` that changes nothing because of a slip.

    Args:
        names: Of all parameters of the model, as the engine has them.
        stage: Holds the pattern.

    Raises:
        TrainError: It matches no name.
    """
    pattern = stage.trainable_parameters_regex
    if any(re.search(pattern, name) for name in names):
        return
    parts = {part: name for name in names for part in name.split(".")}
    meant = [difflib.get_close_matches(word, parts, n=1) for word in re.findall(r"\w+", pattern)]
    close = dict.fromkeys(parts[part] for found in meant for part in found) or names[:3]
    raise TrainError(
        f"train.{stage.name}: trainable_parameters_regex {pattern!r} matches no parameter; engine "
        f"{stage.engine} calls them such as {', '.join(close)}"
    )


def adaptable(
    stage: TrainStage, family: Family, *, linear: Iterable[str], experts: Iterable[str]
) -> tuple[list[str], list[str]]:
    """Those of a model's linear layers, and of its stacked experts, that may get an adapter.

    Args:
        stage: Freezes groups, and says whether adapters belong to the language model alone.
        family: The model's.
        linear: HF names of linear layers.
        experts: HF names of stacked experts' parameters.
    """
    frozen = frozen_groups(stage)
    llm_alone = stage.tuner_type == "lora_llm" or not stage.target_modules

    def may(name: str) -> bool:
        group = family.group_of(name)
        wanted = group == "llm" or not llm_alone
        return wanted and not frozen[group] and not name.startswith("lm_head")

    return [name for name in linear if may(f"{name}.weight")], [n for n in experts if may(n)]


def targeted(stage: TrainStage, candidates: Collection[str]) -> set[str]:
    """Those of the layers and experts that may get an adapter which the stage asks for.

    Raises:
        TrainError: There are none, or a name in target_modules matches none of them.
    """
    where = f"train.{stage.name}: target_modules"
    if not candidates:
        raise TrainError(
            f"{where}: the model has no linear layer in an unfrozen group; unfreeze one"
        )
    if not stage.target_modules or ALL_LINEAR in stage.target_modules:
        return {*candidates}
    matches = {
        target: {name for name in candidates if f".{name}".endswith(f".{target}")}
        for target in stage.target_modules
    }
    if lost := [target for target, names in matches.items() if not names]:
        raise TrainError(
            f"{where}: {', '.join(lost)}: no linear layer of an unfrozen group is called so; there "
            f"are: {', '.join(sorted({name.rpartition('.')[2] for name in candidates}))}"
        )
    return set().union(*matches.values())


def require_peft_kind(stage: TrainStage, experts: Iterable[str]) -> None:
    """Refuses adapters of a kind that peft does not have for stacked experts.

    Raises:
        TrainError: DoRA on some of these.
    """
    kinds = sorted({_STACK.split(name)[-1] for name in experts})
    if stage.tuner_type == "dora" and kinds:
        raise TrainError(
            f"train.{stage.name}: tuner_type dora: peft has no DoRA for stacked experts "
            f"({', '.join(kinds)}); name linear layers in target_modules, such as q_proj, or use "
            f"lora"
        )


def adapter_config(stage: TrainStage, hf_dir: Path) -> LoraConfig:
    """The adapters that a stage asks for, as peft says it, from the model's config alone.

    Raises:
        TrainError: A name in target_modules matches no linear layer of an unfrozen group, or peft
            has no such adapter.
    """
    from peft import LoraConfig

    linear, experts = _candidates(stage, hf_dir)
    chosen = targeted(stage, {*linear, *experts})
    require_peft_kind(stage, chosen & {*experts})
    # layers' numbers left out: one pattern for all of them
    patterns = {_NUMBER.sub(r"\\.\\d+\\.", re.escape(name)) for name in chosen & {*linear}}
    return LoraConfig(
        r=stage.lora_rank,
        lora_alpha=stage.lora_alpha,
        use_rslora=stage.use_rslora,
        target_modules="|".join(sorted(patterns)) or None,
        target_parameters=sorted({_STACK.split(name)[-1] for name in chosen & {*experts}}),
    )


def hollow_model(hf_dir: Path, family: Family) -> Any:
    """The transformers model of a folder without memory for its weights."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(hf_dir)
    with torch.device("meta"):
        return getattr(transformers, family.architecture)(config)


def _candidates(stage: TrainStage, hf_dir: Path) -> tuple[list[str], list[str]]:
    """HF names of linear layers, and of stacked experts, that may get an adapter."""
    from torch import nn

    family = family_of(read_config(hf_dir))
    model = hollow_model(hf_dir, family)
    return adaptable(
        stage,
        family,
        linear=[n for n, module in model.named_modules() if type(module) is nn.Linear],
        experts=[n for n, w in model.named_parameters() if ".experts." in n and w.ndim == 3],
    )
