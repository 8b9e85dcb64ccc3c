"""The Prefect flow that builds a vision-language model from a recipe."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

# before prefect is imported: nothing leaves this machine unasked
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")

from prefect import flow  # noqa: E402
from prefect.events.worker import EventsWorker  # noqa: E402
from prefect.logging.handlers import APILogWorker  # noqa: E402
from prefect.states import Failed  # noqa: E402
from pydantic import WithJsonSchema  # noqa: E402

from flows.pipeline import Results, last_stage, plan, run_pipeline, stages_to_offer  # noqa: E402
from flows.request import Request, make_request  # noqa: E402
from tasks.caching import Run, Watcher  # noqa: E402
from tasks.prefect_tasks import (  # noqa: E402
    PrefectTasks,
    PrefectWatcher,
    publish_results,
    publish_stages,
)
from vlmcore.artifacts import Store  # noqa: E402
from vlmcore.errors import VlmflowError  # noqa: E402
from vlmcore.proc import reap  # noqa: E402
from vlmcore.recipe import list_recipes  # noqa: E402

_RECIPES = tuple(path.stem for path in list_recipes())
# a menu in the UI; the schema is spelled out because a Literal of one value would be a constant
RecipeName: Any = Annotated[
    Literal[_RECIPES] if _RECIPES else str,
    WithJsonSchema({"type": "string", "enum": list(_RECIPES)}),
]
StageName: Any = Literal[stages_to_offer()]
DRAIN_S = 5.0  # for log lines and events of a run that has ended
DESCRIPTION = "Builds what the store lacks of a recipe, scores the checkpoints, holds the gates."


@flow(name="build_vlm", description=DESCRIPTION, flow_run_name="{recipe}", persist_result=False)
def build_vlm(
    recipe: RecipeName = "handwritten_numbers",
    refresh: list[StageName] = [],  # noqa: B006 - prefect reads it, nobody writes it
    overrides: list[str] = [],  # noqa: B006
    start_from: str = "",
    until: str = "",
    store: str = "",
) -> Any:
    """The flow of both deployments; the UI's form takes its help from these lines.

    Args:
        recipe: What to build: one of the files in deployments/recipes.
        refresh: Stages to build again although the store has them; `train` means all under it.
            What comes after them runs again only if their content has changed.
        overrides: Values other than the recipe's, as after `--set` on the command line:
            train.full.learning_rate=1e-4
        start_from: Build nothing before this stage, e.g. train.full; what precedes it must be in
            the store. Empty: from the start.
        until: End after this stage, e.g. export.full. Empty: go on to the report.
        store: Folder of the artifacts. Empty: the one that `vlmflow up` has shown.
    """
    try:
        request = make_request(
            recipe,
            overrides=overrides,
            refresh=refresh,
            start_from=start_from,
            until=until,
            store=store,
        )
        plan(request)  # finds stage names that do not exist before anything is built
        walk(new_run(request, Watcher()), request).require_gates()
    except VlmflowError as error:
        return Failed(message=str(error))  # raised, it would be a page of traceback in the UI
    return None


def run_as_flow(request: Request, run: Run) -> Results:
    """Runs a request as a flow run of `build_vlm` in this process.

    A missed gate fails the flow run, but not this function: the results are the caller's to show.
    """
    results: list[Results] = []
    errors: list[VlmflowError] = []

    @flow(name="build_vlm", flow_run_name=request.recipe.name, persist_result=False)
    def build(recipe: str, refresh: list[str], start_from: str | None, until: str | None) -> Any:
        try:
            results.append(walk(run, request))
            results[0].require_gates()
        except VlmflowError as error:
            errors.append(error)
            return Failed(message=str(error))
        return None

    asked = (list(request.refresh), request.start_from, request.until)
    state = build(request.recipe.name, *asked, return_state=True)
    # the caller may stop the server next; what is unsent would be tried for a minute
    APILogWorker.drain_all(timeout=DRAIN_S)
    EventsWorker.drain_all(timeout=DRAIN_S)
    if not results:
        if errors:
            raise errors[0]
        state.result()  # raises what the flow died of
    return results[0]


def new_run(request: Request, watcher: Watcher) -> Run:
    """A run whose stages are Prefect tasks."""
    return Run(
        Store(request.store),
        log_dir=request.log_dir,
        refresh=request.refresh,
        start_from=request.start_from,
        until=last_stage(request),
        execute=PrefectTasks(),
        watcher=PrefectWatcher(watcher),
    )


def walk(run: Run, request: Request) -> Results:
    """The body of a flow run: the pipeline, then what the UI shows of it."""
    try:
        with reap():
            results = run_pipeline(run, request.recipe)
    except VlmflowError:
        publish_stages(request.recipe.name, run.outcomes)
        raise
    publish_stages(request.recipe.name, run.outcomes)
    report = run.artifacts.get("report")
    publish_results(
        request.recipe.name,
        results.scores,
        results.gates,
        report=report.path / "report.html" if report else None,
    )
    return results
