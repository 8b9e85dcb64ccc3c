"""One run as one HTML page that needs nothing beside itself: what came out, how, and the proofs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from vlmcore.artifacts import BuildRecord
from vlmcore.report.answers import Sample, collect_samples
from vlmcore.report.documents import (
    Audit,
    Conversion,
    Evidence,
    Precision,
    Prediction,
    Shards,
    SwapProof,
    read_document,
)
from vlmcore.report.graph import BOX_HEIGHT, Drawing, draw_graph
from vlmcore.report.rendering import render
from vlmcore.report.training import training_of

T = TypeVar("T")

NUM_SAMPLES = 24  # over all benchmarks: their images are most of the page's size


class Gate(Protocol):
    """A condition on a score and what came of it."""

    @property
    def gate(self) -> str:
        """As the recipe says it, such as `holdout.exact_match >= 0.9`."""

    @property
    def value(self) -> float:
        """The score that it was held against."""

    @property
    def passed(self) -> bool:
        """Whether it holds."""


@dataclass(frozen=True)
class ReportInput:
    """A finished run; equal inputs give the same page, byte for byte."""

    name: str
    """Of the recipe."""
    recipe: str
    """Its YAML, as run."""
    records: Sequence[BuildRecord]
    """Every stage of the run, each behind the stages that it was built from."""
    folders: Mapping[str, Path]
    """Stage → folder of its artifact."""
    scores: Mapping[str, Mapping[str, float]]
    """Checkpoint → `benchmark.metric` → value."""
    gates: Sequence[Gate]
    checkpoints: Sequence[str]
    """Names in the order in which they came about, such as swap, align, full."""


class Result(Protocol):
    """Anything with a verdict."""

    @property
    def passed(self) -> bool:
        """Whether it is as it should be."""


@dataclass(frozen=True)
class Check:
    """The verdict over all proofs of a kind: `passed`, `failed` or `absent`, and where they are."""

    words: str
    where: str
    state: str


@dataclass(frozen=True)
class Tally:
    """How many answers of a checkpoint are right, and how sure that makes its score."""

    right: int
    total: int
    low: float
    high: float


@dataclass(frozen=True)
class Gallery:
    """Sample answers of the last checkpoint that a benchmark asked."""

    benchmark: str
    checkpoint: str
    source: Evidence[list[Prediction]]
    samples: Sequence[Sample]
    num_wrong: int


def render_report(report: ReportInput) -> str:
    """The page of a run. What an artifact lacks is named on it, never an error."""
    metrics = list(dict.fromkeys(name for found in report.scores.values() for name in found))
    benchmarks = list(dict.fromkeys(metric.rpartition(".")[0] for metric in metrics))
    answers = {
        (checkpoint, benchmark): _predictions(report, checkpoint, benchmark)
        for benchmark in benchmarks
        for checkpoint in report.checkpoints
        if f"evaluate.{checkpoint}.{benchmark}" in report.folders
    }
    swap = read_document(report.folders, "swap", "proof.json", SwapProof)
    tested = _tested(report)
    precision = [
        found
        for prefix in tested
        for found in _read_all(report, prefix, "precision.json", list[Precision])
    ]
    reloads = _read_all(report, "export", "precision.json", list[Precision])
    return render(
        "page.html.jinja",
        report=report,
        scored=[name for name in report.checkpoints if report.scores.get(name)],
        metrics=metrics,
        tallies={one: _tally(found.content) for one, found in answers.items() if found.content},
        galleries=_galleries(report, answers),
        seconds=sum(record.seconds for record in report.records),
        started_at=min((record.started_at for record in report.records), default=None),
        finished_at=max((record.finished_at for record in report.records), default=None),
        versions=_versions(report.records),
        commits=sorted({record.git_commit for record in report.records if record.git_commit}),
        graph=_graph(report.records),
        box_height=BOX_HEIGHT,
        slowest=max((record.seconds for record in report.records), default=0.0) or 1.0,
        swap=swap,
        precision=precision,
        conversions=[
            *(
                _read_all(report, "to_mcore", "conversion.json", Conversion)
                if "to_mcore" in tested
                else ()
            ),
            *_read_all(report, "export", "conversion.json", Conversion),
        ],
        reloads=reloads,
        checks=[
            _check("Swap proof", "#swap", [swap], lambda proof: [proof]),
            *(
                [_check("Precision", "#precision", precision, lambda tests: tests)]
                if precision
                else ()
            ),
            _check("Export reload", "#reload", reloads, lambda tests: tests),
        ],
        data=[
            (
                read_document(report.folders, stage, "report.json", Shards),
                read_document(
                    report.folders, f"{stage.removesuffix('.shards')}.audit", "audit.json", Audit
                ),
            )
            for stage in report.folders
            if stage.startswith("data.") and stage.endswith(".shards")
        ],
        trainings=[training_of(report.folders, stage) for stage in _stages(report, "train")],
    )


def _stages(report: ReportInput, prefix: str) -> list[str]:
    return [one.stage for one in report.records if one.stage.startswith(prefix)]


def _tested(report: ReportInput) -> list[str]:
    """Prefixes of the stages that compare Megatron's logits with Hugging Face's; none where no
    stage trains with Megatron."""
    # the test stands alone where training reads HF weights straight into its ranks
    found = [prefix for prefix in ("to_mcore", "precision") if _stages(report, prefix)]
    engines = {one.params.get("engine") for one in report.records if one.stage.startswith("train.")}
    return found or ([] if engines == {"transformers"} else ["to_mcore"])


def _read_all(report: ReportInput, prefix: str, name: str, kind: type[T]) -> list[Evidence[T]]:
    """A document of every stage under a prefix; of the prefix itself where there is no stage."""
    stages = _stages(report, prefix) or [prefix]
    return [read_document(report.folders, stage, name, kind) for stage in stages]


def _check(
    name: str, where: str, found: Sequence[Evidence[T]], results: Callable[[T], Sequence[Result]]
) -> Check:
    passed = [one.passed for doc in found if doc.content for one in results(doc.content)]
    num_absent = sum(not doc.content for doc in found)
    state = "absent" if not passed else "passed" if all(passed) else "failed"
    rest = f", {num_absent} absent" if passed and num_absent else ""
    return Check(f"{name} {state}{rest}", where, state)


def _versions(records: Iterable[BuildRecord]) -> dict[str, str]:
    """Package → version, or several where stages were built with different ones."""
    seen: dict[str, dict[str, None]] = {}
    for record in records:
        for package, version in record.versions.items():
            seen.setdefault(package, {})[version] = None
    return {package: ", ".join(versions) for package, versions in seen.items()}


def _graph(records: Sequence[BuildRecord]) -> Drawing:
    known: set[str] = set()
    parents: dict[str, list[str]] = {}
    for record in records:
        parents[record.stage] = [one.stage for _, one in record.input_refs if one.stage in known]
        known.add(record.stage)
    return draw_graph(parents)


def _predictions(
    report: ReportInput, checkpoint: str, benchmark: str
) -> Evidence[list[Prediction]]:
    stage = f"evaluate.{checkpoint}.{benchmark}"
    return read_document(report.folders, stage, "predictions.jsonl", list[Prediction])


def _galleries(
    report: ReportInput, answers: Mapping[tuple[str, str], Evidence[list[Prediction]]]
) -> list[Gallery]:
    """For each benchmark the answers of the last checkpoint that it asked."""
    by_benchmark: dict[str, dict[str, Evidence[list[Prediction]]]] = {}
    for (checkpoint, benchmark), found in answers.items():
        by_benchmark.setdefault(benchmark, {})[checkpoint] = found
    return [
        _gallery(report, benchmark, asked, count=NUM_SAMPLES // len(by_benchmark))
        for benchmark, asked in by_benchmark.items()
    ]


def _gallery(
    report: ReportInput,
    benchmark: str,
    asked: Mapping[str, Evidence[list[Prediction]]],
    *,
    count: int,
) -> Gallery:
    *earlier, checkpoint = asked
    said = asked[checkpoint].content or []
    samples = collect_samples(
        said,
        {name: asked[name].content or [] for name in earlier},
        image_dir=_holdout(report, asked[checkpoint].stage),
        count=count,
    )
    num_wrong = sum(not one.correct for one in said)
    return Gallery(benchmark, checkpoint, asked[checkpoint], samples, num_wrong)


def _holdout(report: ReportInput, stage: str) -> Path | None:
    """The folder of the holdout that an evaluation was built from."""
    inputs = [pair for one in report.records if one.stage == stage for pair in one.input_refs]
    names = (ref.stage for name, ref in inputs if name == "holdout")
    return report.folders.get(next(names, ""))


def _tally(predictions: Sequence[Prediction]) -> Tally:
    """Counts, and Wilson's 95 % interval for the share of right answers."""
    right, total, z = sum(one.correct for one in predictions), len(predictions), 1.96
    share = right / total
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    spread = (share * (1 - share) / total + z**2 / (4 * total**2)) ** 0.5 / (1 + z**2 / total)
    return Tally(right, total, max(0.0, middle - z * spread), min(1.0, middle + z * spread))
