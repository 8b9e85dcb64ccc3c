"""The page of a run, made from the artifacts that the run is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tasks.caching import Ref, Run
from vlmcore.artifacts import BuildContext
from vlmcore.evaluation.gates import GateResult
from vlmcore.recipe import Recipe
from vlmcore.recipe.loading import dump_recipe

PAGE = "report.html"


def report(
    run: Run,
    recipe: Recipe,
    *,
    scores: Mapping[str, Mapping[str, float]],
    gates: Sequence[GateResult],
) -> Ref:
    """`report.html`: lineage, proofs, curves, scores and sample answers, in one file."""

    artifacts = dict(run.artifacts)

    def build(context: BuildContext) -> None:
        from vlmcore.report import ReportInput, render_report

        known = {name: ref for name, ref in artifacts.items() if ref is not None}
        page = render_report(
            ReportInput(
                name=recipe.name,
                recipe=dump_recipe(recipe),
                records=[run.store.record(ref) for ref in known.values()],
                folders={name: ref.path for name, ref in known.items()},
                scores=scores,
                gates=gates,
                checkpoints=list(scores),
            )
        )
        (context.path / PAGE).write_text(page, encoding="utf-8")

    return run.stage(
        "report",
        build,
        kind="report",
        version=3,
        params={"recipe": dump_recipe(recipe)},
        inputs=artifacts,
    )
