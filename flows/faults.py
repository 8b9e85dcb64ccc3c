"""What ranks and servers would refuse of a recipe, told all at once before any stage starts.

It takes the donors' files: those of a local folder, or what the store has of them. Of a donor that
is still to be fetched or built nothing is known yet; it is looked at as soon as it is there.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.caching import Ref, matches
from vlmcore.errors import MissingExtraError, TrainError, WeightError
from vlmcore.recipe import Recipe
from vlmcore.recipe.schema import Convert
from vlmcore.surgery.donors import local_donor

if TYPE_CHECKING:
    from vlmcore.training.model_outline import ModelOutline


def refuse(faults: Collection[str]) -> None:
    """Refuses a recipe that has faults.

    Raises:
        TrainError: Lists them.
    """
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise TrainError(f"the recipe would fail with {count}:\n  " + "\n  ".join(faults))


def model_faults(recipe: Recipe, *, vlm: Ref, llm: Ref) -> list[str]:
    """What stages and precision tests ask of models that are not so.

    Args:
        recipe: What is to be run.
        vlm: The vision donor, if the store has it.
        llm: The LLM donor, likewise.
    """
    from vlmcore.training.stage_fit import fit_faults

    models, faults = _outlines(recipe, vlm=vlm, llm=llm)
    for kind, model in models.items():
        stages = [stage for stage in recipe.train if stage.model == kind]
        if stages or kind == "vlm":
            faults += _precision_faults(recipe.convert, model, {stage.engine for stage in stages})
        faults += [fault for stage in stages for fault in fit_faults(stage, model)]
    return list(dict.fromkeys(faults))


def machine_faults(recipe: Recipe, to_run: Collection[str]) -> list[str]:
    """What the stages that are to run need that this machine, which would run them, lacks."""
    from vlmcore.serving.engines import pick_engine
    from vlmcore.training import stage_fit

    stages = [stage for stage in recipe.train if f"train.{stage.name}" in to_run]
    faults = [fault for stage in stages for fault in stage_fit.machine_faults(stage)]
    if any(matches(name, "evaluate") for name in to_run):
        try:
            pick_engine(recipe.serve.engine)
        except MissingExtraError as error:
            faults.append(str(error))
    return faults


def _outlines(recipe: Recipe, *, vlm: Ref, llm: Ref) -> tuple[dict[str, ModelOutline], list[str]]:
    """The models that stages train, by the recipe's name for them, and what is wrong with them."""
    from vlmcore.training.model_outline import outline, outline_of_swap

    eyes, tongue = _at_hand(vlm, recipe.model.vlm), _at_hand(llm, recipe.model.llm)
    found: dict[str, ModelOutline] = {}
    try:
        if tongue is not None:
            found["llm"] = outline(tongue)
        if recipe.model.llm is None and eyes is not None:
            found["vlm"] = outline(eyes)
        elif eyes is not None and tongue is not None:
            found["vlm"] = outline_of_swap(eyes, tongue, shell=recipe.model.shell)
    except WeightError as error:
        return found, [f"model: {error}"]
    if "llm" in found and not found["llm"].has_chat_template:
        return found, [f"swap: {tongue} has no chat template; add chat_template.jinja"]
    return found, []


def _precision_faults(convert: Convert, model: ModelOutline, engines: set[str]) -> list[str]:
    """Layouts of the precision test that do not divide the model it is run on."""
    from vlmcore.training.stage_fit import layout_faults

    if not convert.check or engines == {"transformers"}:
        return []
    found = [fault for layout in convert.layouts for fault in layout_faults(layout, model)]
    return [f"convert: {fault}" for fault in found]


def _at_hand(ref: Ref, name: str | None) -> Path | None:
    """The folder of a donor that can be looked at."""
    if ref is not None or name is None:
        return ref and ref.path
    return local_donor(name)
