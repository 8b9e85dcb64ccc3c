"""The Prefect flow that builds a vision-language model from a recipe."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

# before prefect is imported: nothing leaves this machine unasked
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")

from prefect import flow  # noqa: E402
from pydantic import Field  # noqa: E402

from flows.pipeline import Results, run_pipeline  # noqa: E402
from flows.request import Request, make_request  # noqa: E402
from tasks.caching import Run, Watcher  # noqa: E402
from tasks.prefect_tasks import PrefectWatcher, as_prefect_task, publish_summary  # noqa: E402
from vlmcore.artifacts import Store  # noqa: E402
from vlmcore.proc import reap  # noqa: E402
from vlmcore.recipe import list_recipes  # noqa: E402

_NAMES = tuple(sorted(path.stem for path in list_recipes()))
RecipeName: Any = Literal[_NAMES] if _NAMES else str  # the UI offers these


@flow(name="build_vlm", flow_run_name="{recipe}", persist_result=False)
def build_vlm(
    recipe: Annotated[
        RecipeName, Field(description="Recipe.", json_schema_extra={"position": 0})
    ] = "handwritten_numbers",
    refresh: Annotated[
        list[str],
        Field(
            description="Stages to build again although the store has them, e.g. train.full.",
            json_schema_extra={"position": 1},
        ),
    ] = [],  # noqa: B006 - prefect reads it, nobody writes it
    overrides: Annotated[
        list[str],
        Field(
            description="Values other than the recipe's, e.g. train.full.learning_rate=1e-4.",
            json_schema_extra={"position": 2},
        ),
    ] = [],  # noqa: B006
    start_from: Annotated[
        str,
        Field(
            description="Build nothing before this stage; what precedes it must be in the store.",
            json_schema_extra={"position": 3},
        ),
    ] = "",
    until: Annotated[
        str, Field(description="End after this stage.", json_schema_extra={"position": 4})
    ] = "",
    store: Annotated[
        str,
        Field(
            description="Artifact store; empty: $VLMFLOW_STORE, else .vlmflow/store.",
            json_schema_extra={"position": 5},
        ),
    ] = "",
) -> None:
    """Builds what the store lacks of a recipe's stages, scores the checkpoints, holds the gates."""
    request = make_request(
        recipe,
        overrides=overrides,
        refresh=refresh,
        start_from=start_from,
        until=until,
        store=store,
    )
    walk(new_run(request, Watcher()), request).require_gates()


def run_as_flow(request: Request, run: Run) -> Results:
    """Runs a request as a flow run of `build_vlm` in this process; gates are the caller's."""
    done: list[Results] = []

    @flow(name="build_vlm", flow_run_name=request.recipe.name, persist_result=False)
    def build(recipe: str, refresh: list[str], start_from: str | None, until: str | None) -> None:
        done.append(walk(run, request))

    build(request.recipe.name, list(request.refresh), request.start_from, request.until)
    return done[0]


def new_run(request: Request, watcher: Watcher) -> Run:
    """A run whose stages are Prefect tasks."""
    return Run(
        Store(request.store),
        log_dir=request.log_dir,
        refresh=request.refresh,
        start_from=request.start_from,
        until=request.until,
        execute=as_prefect_task,
        watcher=PrefectWatcher(watcher),
    )


def walk(run: Run, request: Request) -> Results:
    """The body of a flow run: the pipeline, then what the UI shows of it."""
    with reap():
        results = run_pipeline(run, request.recipe)
    report = run.artifacts.get("report")
    publish_summary(
        table=[
            {"stage": o.name, "state": o.state, "seconds": o.seconds, "digest": o.digest[:12]}
            for o in run.outcomes
        ],
        scores=[{"checkpoint": name, **values} for name, values in results.scores.items()],
        report_path=str(report.path / "report.html") if report else None,
    )
    return results
