"""Stages as Prefect tasks: a state named Cached for a hit, a progress bar for a long build."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any
from uuid import UUID

from prefect import task
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed, State

from tasks.caching import StageOutcome, Watcher
from vlmcore.artifacts import ArtifactRef, BuildResult, StageSpec
from vlmcore.errors import VlmflowError
from vlmcore.evaluation.gates import GateResult

SECONDS_BETWEEN_UPDATES = 2.0


class PrefectTasks:
    """Runs each stage as a Prefect task that carries its name; an executor for `Run`."""

    def __init__(self) -> None:
        self._states: dict[str, State] = {}  # of the task that gave an artifact, by its digest
        self._behind: dict[str, set[str]] = {}  # digests of all that an artifact was made from

    def __call__(self, spec: StageSpec, work: Callable[[], BuildResult]) -> BuildResult:
        """Runs `work` as a task that follows the tasks of its inputs."""
        results: list[BuildResult] = []
        errors: list[VlmflowError] = []

        @task(name=spec.kind, task_run_name=spec.stage, cache_policy=NO_CACHE, persist_result=False)
        def stage() -> Any:
            try:
                results.append(work())
            except VlmflowError as error:
                errors.append(error)
                return Failed(message=str(error))  # raised, a traceback would bury the sentence
            ref, seconds = results[0].ref, results[0].seconds
            if results[0].state == "cached":
                return Completed(name="Cached", message=f"in the store: {ref}")
            return Completed(message=f"built in {seconds:.1f} s: {ref}")

        inputs = {ref.digest for ref in _refs(spec)}
        behind = set().union(*(self._behind[digest] for digest in inputs))
        # nothing is waited for: the UI draws its arrows from this, without those that others imply
        direct = [self._states[digest] for digest in inputs - behind]
        state = stage(wait_for=direct, return_state=True)
        if errors:
            raise errors[0]
        if not results:
            state.result()  # raises what the stage died of
        digest = results[0].ref.digest
        self._states[digest], self._behind[digest] = state, inputs | behind
        return results[0]


def _refs(spec: StageSpec) -> list[ArtifactRef]:
    given = spec.inputs.values()
    return [ref for one in given for ref in ([one] if isinstance(one, ArtifactRef) else one)]


class PrefectWatcher(Watcher):
    """Writes progress artifacts and log lines of the run, then hands on to another watcher."""

    def __init__(self, inner: Watcher) -> None:
        self._inner = inner
        self._artifacts: dict[str, UUID] = {}
        self._updated_at = 0.0

    def started(self, stage: str) -> None:
        """A stage begins to build."""
        get_run_logger().info("building")
        self._inner.started(stage)

    def progress(self, stage: str, done: float, total: float, text: str) -> None:
        """Updates the stage's progress bar, not more often than people can read."""
        self._inner.progress(stage, done, total, text)
        percent = 100.0 * done / total
        if stage not in self._artifacts:
            created = create_progress_artifact(percent, key=_key(stage), description=text or stage)
            self._artifacts[stage] = created  # type: ignore[assignment]
        elif time.monotonic() - self._updated_at > SECONDS_BETWEEN_UPDATES or done == total:
            update_progress_artifact(self._artifacts[stage], percent, description=text)
            self._updated_at = time.monotonic()
            get_run_logger().info("%d of %d  %s", done, total, text)

    def note(self, stage: str, text: str) -> None:
        """Writes a line into the run's log."""
        get_run_logger().info(text)
        self._inner.note(stage, text)

    def finished(self, outcome: StageOutcome) -> None:
        """A stage has ended."""
        self._inner.finished(outcome)


def publish_stages(recipe: str, outcomes: Sequence[StageOutcome]) -> None:
    """Shows what ran, what was cached, and why."""
    rows = [
        {
            "stage": o.name,
            "state": o.state,
            "seconds": o.seconds,
            "digest": o.digest[:12],
            "why": shorten("; ".join(o.reasons), 200, placeholder=" …"),
        }
        for o in outcomes
    ]
    create_table_artifact(rows, key=_key(recipe, "stages"), description="What ran, and why")


def publish_results(
    recipe: str,
    scores: Mapping[str, Mapping[str, float]],
    gates: Sequence[GateResult],
    *,
    report: Path | None,
) -> None:
    """Shows the scores as a table, and the gates and the report's place as a page."""
    if scores:
        rows = [{"checkpoint": name, **values} for name, values in scores.items()]
        create_table_artifact(rows, key=_key(recipe, "scores"), description="Scores by checkpoint")
    if report:
        verdicts = {True: "passed", False: "**missed**"}
        lines = [f"- gate `{g.gate}`: {g.value:.4f}, {verdicts[g.passed]}" for g in gates]
        # a browser opens no file:// link of a page that came over http
        lines.append(f"- the report is a file, open it beside this page: `{report}`")
        create_markdown_artifact(
            "\n".join([f"# {recipe}", *lines]), key=_key(recipe, "report"), description="Report"
        )


def _key(*parts: str) -> str:
    """An artifact key as Prefect takes it: lower case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")
