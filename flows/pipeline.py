"""The pipeline, stage by stage: from donors and data to a scored model and its report."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from flows.faults import machine_faults, model_faults, refuse
from flows.request import Request
from tasks.caching import Ref, Run, UntilReached, matches
from tasks.convert import export, precision, to_mcore
from tasks.data import audit, energon, holdout, holdout_of_shards, raw_dataset, shards
from tasks.evaluation import evaluate
from tasks.model import donor, swap
from tasks.report import report
from tasks.training import train
from vlmcore.artifacts import Store
from vlmcore.errors import GateError, RecipeError, VlmflowError
from vlmcore.evaluation.gates import GateResult, check_gates
from vlmcore.recipe import Recipe, list_recipes, load_recipe
from vlmcore.recipe.train_stage import TrainStage


@dataclass
class Results:
    """What came out: scores by checkpoint, and the gates held against them."""

    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    gates: list[GateResult] = field(default_factory=list)

    def require_gates(self) -> None:
        """Fails where a score misses a gate.

        Raises:
            GateError: Lists the gates that were missed, with the scores.
        """
        missed = [f"{g.gate}: found {g.value:.4g}" for g in self.gates if not g.passed]
        if missed:
            raise GateError("gates missed: " + "; ".join(missed))


def run_pipeline(run: Run, recipe: Recipe) -> Results:
    """Walks the stages of a recipe; ends early where the run's `until` says so."""
    results = Results()
    with suppress(UntilReached):
        _walk(run, recipe, results)
    return results


def plan(request: Request) -> tuple[Run, Results]:
    """Walks the pipeline without building.

    Raises:
        VlmflowError: The request names a stage that the pipeline does not have.
        TrainError: Lists what the ranks would refuse of stages, as far as it can be known.
    """
    whole, results = _dry(request)
    names = [outcome.name for outcome in whole.outcomes]
    asked = [*request.refresh, request.start_from, request.until]
    for pattern in filter(None, asked):
        if not any(matches(name, pattern) for name in names):
            raise VlmflowError(
                f"no stage is named {pattern!r}; the stages of {request.recipe.name} are: "
                f"{', '.join(names)}"
            )
    if any(outcome.state == "to run" for outcome in whole.outcomes):
        refuse(_faults(request.recipe, whole))
    if request.start_from or request.until:
        until = _last_of(names, request.until)
        return _dry(request, start_from=request.start_from, until=until)
    return whole, results


def _faults(recipe: Recipe, planned: Run) -> list[str]:
    known = planned.artifacts
    to_run = {outcome.name for outcome in planned.outcomes if outcome.state == "to run"}
    return [
        *model_faults(recipe, vlm=known["model.vlm"], llm=known.get("model.llm")),
        *machine_faults(recipe, to_run),
    ]


def last_stage(request: Request) -> str | None:
    """The last of the stages that the request's `until` names; None: the pipeline's last."""
    if request.until is None:
        return None
    whole, _ = _dry(request)
    return _last_of([outcome.name for outcome in whole.outcomes], request.until)


def _last_of(names: Sequence[str], pattern: str | None) -> str | None:
    return next((name for name in reversed(names) if pattern and matches(name, pattern)), None)


def _dry(request: Request, **limits: Any) -> tuple[Run, Results]:
    store, refresh = Store(request.store), request.refresh
    run = Run(store, log_dir=request.log_dir, dry=True, refresh=refresh, **limits)
    return run, run_pipeline(run, request.recipe)


def stages_to_offer() -> tuple[str, ...]:
    """Stages and prefixes that a form can offer, over all recipes of the checkout."""
    names = {"data", "model", "swap", "to_mcore", "train", "export", "evaluate", "report"}
    for path in list_recipes():
        with suppress(RecipeError):  # told when somebody runs that recipe
            recipe = load_recipe(path)
            names |= {f"data.{name}" for name in recipe.data}
            for stage in recipe.train:
                names |= {f"train.{stage.name}", f"export.{stage.name}"}
            names |= {f"evaluate.{name}" for name in recipe.checkpoints}
    return tuple(sorted(names))


def _walk(run: Run, recipe: Recipe, results: Results) -> None:
    raw = {
        name: raw_dataset(run, name, spec, seed=recipe.seed) for name, spec in recipe.data.items()
    }
    tars = {name: shards(run, name, spec, raw=raw[name]) for name, spec in recipe.data.items()}
    data = {
        name: energon(run, name, shards=tars[name], sample_type=spec.sample_type)
        for name, spec in recipe.data.items()
    }
    asked = _held_out(run, recipe, raw=raw, tars=tars)
    for name, spec in recipe.data.items():
        audit(run, name, spec, shards=tars[name], holdouts=list(asked.values()))

    model, llm = donor(run, "vlm", recipe.model.vlm, seed=recipe.seed), None
    if recipe.model.llm is not None:
        llm = donor(run, "llm", recipe.model.llm, seed=recipe.seed)
    if not run.dry:  # a plan may have known less, where a donor had to be fetched
        refuse(model_faults(recipe, vlm=model, llm=llm))
    if recipe.model.llm is not None:
        llm = _taught_llm(run, recipe, data, llm=llm)
        model = swap(run, vlm=model, llm=llm, seed=recipe.seed, shell=recipe.model.shell)

    checkpoints = {"swap": model}
    stages = [stage for stage in recipe.train if stage.model == "vlm"]
    trained = _for_training(run, recipe, "to_mcore", model=model, stages=stages)
    for stage in stages:
        trained = _train(run, recipe, stage, model=trained, data=data)
        exported = export(run, f"export.{stage.name}", recipe.export, trained=trained)
        checkpoints[stage.name] = exported

    for entry in recipe.evaluate:
        for checkpoint in recipe.scored_checkpoints(entry):
            answers = evaluate(
                run,
                checkpoint,
                entry,
                recipe.serve,
                model=checkpoints[checkpoint],
                holdout=asked[entry.benchmark],
            )
            if answers is not None:
                scores = results.scores.setdefault(checkpoint, {})
                scores |= run.store.record(answers).metrics["scores"]
    if all(answer is not None for answer in run.artifacts.values()):
        last = {one.benchmark: recipe.scored_checkpoints(one)[-1] for one in recipe.evaluate}
        results.gates = check_gates(recipe.gates, results.scores, default_checkpoints=last)
    report(run, recipe, scores=results.scores, gates=results.gates)


def _held_out(
    run: Run, recipe: Recipe, *, raw: dict[str, Ref], tars: dict[str, Ref]
) -> dict[str, Ref]:
    """Benchmark → its questions: before training, which must not have seen them."""
    asked = {}
    for entry in recipe.evaluate:
        source = recipe.data[entry.data]
        asked[entry.benchmark] = (
            holdout_of_shards(run, entry, shards=tars[entry.data])
            if source.split_ratios
            else holdout(run, entry, raw=raw[entry.data], dataset=source)
        )
    return asked


def _for_training(
    run: Run, recipe: Recipe, name: str, *, model: Ref, stages: Sequence[TrainStage]
) -> Ref:
    """What stages start from: a Megatron checkpoint, or on the fly the HF model itself.

    One stage of engine transformers has them all read and write HF folders: each engine can.
    """
    engines = {stage.engine for stage in stages}
    if not recipe.convert.on_the_fly and "transformers" not in engines:
        return to_mcore(run, name, recipe.convert, model=model)
    if recipe.convert.check and engines != {"transformers"}:
        precision(run, name.replace("to_mcore", "precision"), recipe.convert, model=model)
    return model


def _taught_llm(run: Run, recipe: Recipe, data: dict[str, Ref], *, llm: Ref) -> Ref:
    """The LLM donor, after the stages that train it before the swap."""
    stages = [stage for stage in recipe.train if stage.model == "llm"]
    if not stages:
        return llm
    trained = _for_training(run, recipe, "to_mcore.llm", model=llm, stages=stages)
    for stage in stages:
        trained = _train(run, recipe, stage, model=trained, data=data)
    return export(run, f"export.{stages[-1].name}", recipe.export, trained=trained)


def _train(run: Run, recipe: Recipe, stage: TrainStage, *, model: Ref, data: dict[str, Ref]) -> Ref:
    return train(
        run,
        stage,
        model=model,
        datasets=[data[name] for name in stage.data],
        weights=[recipe.data[name].weight for name in stage.data],
    )
