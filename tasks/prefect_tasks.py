"""Stages as Prefect tasks: a state named Cached for a hit, a progress bar for a long build."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from uuid import UUID

from prefect import task
from prefect.artifacts import (
    create_link_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.states import Completed

from tasks.caching import StageOutcome, Watcher
from vlmcore.artifacts import BuildResult, StageSpec

SECONDS_BETWEEN_UPDATES = 2.0


def as_prefect_task(spec: StageSpec, work: Callable[[], BuildResult]) -> BuildResult:
    """Runs a stage as a Prefect task that carries its name; an executor for `Run`."""
    done: list[BuildResult] = []

    @task(name=spec.kind, task_run_name=spec.stage, cache_policy=NO_CACHE, persist_result=False)
    def stage() -> Any:
        result = work()
        done.append(result)
        if result.state == "cached":
            return Completed(name="Cached", message=f"{result.ref} is in the store")
        return Completed(message=f"{result.ref} built in {result.seconds:.1f} s")

    stage()
    return done[0]


class PrefectWatcher(Watcher):
    """Writes progress artifacts and log lines of the run, then hands on to another watcher."""

    def __init__(self, inner: Watcher) -> None:
        self._inner = inner
        self._artifacts: dict[str, UUID] = {}
        self._updated_at = 0.0

    def started(self, stage: str) -> None:
        """A stage begins to build."""
        get_run_logger().info("%s: building", stage)
        self._inner.started(stage)

    def progress(self, stage: str, done: float, total: float, text: str) -> None:
        """Updates the stage's progress bar, not more often than people can read."""
        self._inner.progress(stage, done, total, text)
        percent = 100.0 * done / total
        if stage not in self._artifacts:
            key = stage.replace(".", "-").replace("_", "-")
            created = create_progress_artifact(percent, key=key, description=text or stage)
            self._artifacts[stage] = created  # type: ignore[assignment]
        elif time.monotonic() - self._updated_at > SECONDS_BETWEEN_UPDATES or done == total:
            update_progress_artifact(self._artifacts[stage], percent, description=text)
            self._updated_at = time.monotonic()
            get_run_logger().info("%s: %d of %d  %s", stage, done, total, text)

    def finished(self, outcome: StageOutcome) -> None:
        """A stage has ended."""
        self._inner.finished(outcome)


def publish_summary(
    *, table: list[dict[str, Any]], scores: list[dict[str, Any]], report_path: str | None
) -> None:
    """Shows a run's stages, scores and report in the Prefect UI."""
    create_table_artifact(table, key="stages", description="What ran and what was cached")
    if scores:
        create_table_artifact(scores, key="scores", description="Scores by checkpoint")
    if report_path:
        create_link_artifact(f"file://{report_path}", link_text="report.html", key="report")
