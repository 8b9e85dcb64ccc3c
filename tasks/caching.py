"""The one caching policy: every stage goes through `Run.stage`, which asks the artifact store.

A hit is the store's alone to give. Prefect keeps no results of ours: a stage that the store already
has ends its task in a state named Cached, so a wiped Prefect database changes nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlmcore.artifacts import (
    ArtifactRef,
    BuildContext,
    BuildResult,
    StageSpec,
    Store,
    explain_miss,
)
from vlmcore.errors import ArtifactError

log = logging.getLogger(__name__)

Ref = ArtifactRef | None  # None: planned, to be built first
Inputs = Mapping[str, Ref | Sequence[Ref]]
Builder = Callable[[BuildContext], Mapping[str, Any] | None]
Executor = Callable[[StageSpec, Callable[[], BuildResult]], BuildResult]
State = Literal["ran", "cached", "failed", "to run"]


@dataclass(frozen=True)
class StageOutcome:
    """What became of a stage, or what a plan expects of it; `reasons` says why it runs."""

    name: str
    state: State
    seconds: float
    digest: str
    reasons: tuple[str, ...] = ()


class Watcher:
    """Hears what a run does; this one keeps quiet."""

    def started(self, stage: str) -> None:
        """A stage begins to build."""

    def progress(self, stage: str, done: float, total: float, text: str) -> None:
        """A stage is `done` of `total` on its way; `text` says where it stands."""

    def note(self, stage: str, text: str) -> None:
        """A stage says something that is to stay on the screen."""

    def finished(self, outcome: StageOutcome) -> None:
        """A stage has ended."""


class UntilReached(Exception):  # noqa: N818 - an ending, not an error
    """The stages named by `until` are done."""


def matches(stage: str, pattern: str) -> bool:
    """Whether a stage carries that name, or stands under it."""
    return stage == pattern or stage.startswith(f"{pattern}.")


def build_plainly(spec: StageSpec, work: Callable[[], BuildResult]) -> BuildResult:
    """Runs a stage without Prefect."""
    return work()


class Run:
    """One walk through a pipeline: builds what the store lacks, or only plans it.

    Args:
        store: The artifact store.
        refresh: Stages (or prefixes) to build although the store has them.
        start_from: Stage (or prefix) before which nothing is built.
        until: Stage after which the walk ends.
        dry: Plan: look everything up, build nothing.
        execute: How a stage is run; Prefect's is in `tasks.prefect_tasks`.
        watcher: Hears about stages and progress.
        log_dir: Where stages put the logs of their child processes.
    """

    def __init__(
        self,
        store: Store,
        *,
        log_dir: Path,
        refresh: Iterable[str] = (),
        start_from: str | None = None,
        until: str | None = None,
        dry: bool = False,
        execute: Executor = build_plainly,
        watcher: Watcher | None = None,
    ) -> None:
        self.store = store
        self.log_dir = log_dir
        self.dry = dry
        self.outcomes: list[StageOutcome] = []
        self.artifacts: dict[str, Ref] = {}  # every stage walked so far
        self.watcher = watcher or Watcher()
        self._refresh = tuple(refresh)
        self._from = start_from
        self._until = until
        self._reached = False
        self._execute = execute

    def stage(
        self,
        name: str,
        build: Builder,
        *,
        kind: str,
        version: int,
        params: Mapping[str, Any],
        inputs: Inputs,
        volatile: Sequence[str] = (),
        resumable: bool = False,
        resumes_over: Sequence[str] = (),
    ) -> Ref:
        """The artifact of a stage: found in the store, or built; None in a plan that must build it.

        Args:
            name: Name of the stage in this recipe, such as `train.full`.
            build: Writes the content; gets the folders to write to.
            kind: What the stage does; stages of one kind and equal inputs share a key.
            version: Raised when the stage's code changes what it writes.
            params: What decides the content, as JSON values.
            inputs: Artifacts that it reads.
            volatile: Globs of content that differs from run to run and is left out of the digest.
            resumable: An interrupted build leaves its scratch folder to the next one.
            resumes_over: Parameters that the next one may have other values of.

        Raises:
            UntilReached: The walk was to end before this stage.
            ArtifactError: The stage stands before `start_from` and is not in the store.
        """
        self._check_until(name)
        waiting = sorted(key for key, given in inputs.items() if _unknown(given))
        if waiting:
            return self._plan_unknown(name, version=version, params=params, inputs=inputs)
        spec = StageSpec(
            stage=name,
            kind=kind,
            version=version,
            params=params,
            inputs=inputs,  # type: ignore[arg-type]  # none is unknown here
            volatile=tuple(volatile),
            resumable=resumable,
            resumes_over=tuple(resumes_over),
        )
        found = self.store.lookup(name, spec.key)
        refresh = any(matches(name, pattern) for pattern in self._refresh)
        reasons = ["refresh asked for"] if found and refresh else []
        if found is None:
            reasons = explain_miss(self.store, name, version=version, params=params, inputs=inputs)
        self._check_from(name, found, reasons)
        if self.dry:
            cached = found is not None and not refresh
            ref = found if cached else None
            self._note(name, "cached" if cached else "to run", 0.0, ref, reasons)
            return ref
        return self._build(spec, build, refresh=refresh, reasons=reasons)

    def progress(self, stage: str, done: float, total: float, text: str) -> None:
        """Reports how far a stage is."""
        self.watcher.progress(stage, done, total, text)

    def note(self, stage: str, text: str) -> None:
        """Has a stage say something that is to stay on the screen."""
        self.watcher.note(stage, text)

    def log_path(self, stage: str) -> Path:
        """File for the output of a stage's child processes."""
        self.log_dir.mkdir(parents=True, exist_ok=True)
        return self.log_dir / f"{stage}.log"

    def _build(
        self, spec: StageSpec, build: Builder, *, refresh: bool, reasons: list[str]
    ) -> ArtifactRef:
        began = time.perf_counter()

        def work() -> BuildResult:
            return self.store.build(spec, announced, refresh=refresh)

        def announced(context: BuildContext) -> Mapping[str, Any] | None:
            self.watcher.started(spec.stage)
            return build(context)

        try:
            result = self._execute(spec, work)
        except BaseException:
            self._note(spec.stage, "failed", time.perf_counter() - began, None, reasons)
            raise
        self._note(
            spec.stage, result.state, result.seconds, result.ref,
            reasons if result.state == "ran" else [],
        )  # fmt: skip
        return result.ref

    def _plan_unknown(
        self, name: str, *, version: int, params: Mapping[str, Any], inputs: Inputs
    ) -> None:
        if not self.dry:
            raise AssertionError(f"{name}: an input is unknown outside a plan")
        known = {key: None if _unknown(given) else given for key, given in inputs.items()}
        reasons = explain_miss(self.store, name, version=version, params=params, inputs=known)  # type: ignore[arg-type]
        self._note(name, "to run", 0.0, None, reasons)

    def _note(
        self, name: str, state: State, seconds: float, ref: Ref, reasons: Sequence[str]
    ) -> None:
        outcome = StageOutcome(
            name, state, round(seconds, 3), ref.digest if ref else "", tuple(reasons)
        )
        self.outcomes.append(outcome)
        self.artifacts[name] = ref
        self.watcher.finished(outcome)

    def _check_until(self, name: str) -> None:
        if self._reached:
            raise UntilReached
        self._reached = name == self._until

    def _check_from(self, name: str, found: Ref, reasons: Sequence[str]) -> None:
        if self._from is None:
            return
        if matches(name, self._from):
            self._from = None
        elif found is None:
            raise ArtifactError(
                f"--from {self._from}: {name} comes before it and is not in the store "
                f"({'; '.join(reasons)}). Run once without --from."
            )


def _unknown(given: Ref | Sequence[Ref]) -> bool:
    if given is None or isinstance(given, ArtifactRef):
        return given is None
    return any(one is None for one in given)
