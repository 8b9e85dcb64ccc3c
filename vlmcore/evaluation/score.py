"""A served model's score on a benchmark, with every single answer, or an error."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from vlmcore import compat, proc
from vlmcore.errors import EvaluationError
from vlmcore.evaluation.job import Answer, Job, Record, Result

if TYPE_CHECKING:
    from vlmcore.serving import Endpoint

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "DO_NOT_TRACK": "1"}
MAX_NAMED = 5


@dataclass(frozen=True)
class Score:
    """`metrics` over all samples; `predictions`: JSONL of records plus `prediction`, `correct`."""

    benchmark: str
    metrics: dict[str, float]
    num_samples: int
    predictions: Path


def score(
    endpoint: Endpoint,
    *,
    benchmark: str,
    records: Path,
    metric: str = "exact_match",
    work_dir: Path,
    max_tokens: int,
    concurrency: int,
) -> Score:
    """Ask the model every record and score the answers; no sample is left out.

    Args:
        endpoint: The served model.
        benchmark: Name under which the score appears.
        records: JSONL of {id, image, question, answer}; images relative to the file's folder.
        metric: A metric of EvalScope's.
        work_dir: A folder that is not there yet, for `predictions.jsonl`, the backend's own files
            and `evaluation.log`; not reused: another model's answers could be taken for this one's.
        max_tokens: Tokens of an answer at most.
        concurrency: Requests in flight.

    Raises:
        EvaluationError: A record is unusable, or a sample has no answer, as when the server died.
        FileExistsError: `work_dir` is there already.
    """
    asked = read_records(records)
    work_dir.mkdir(parents=True)
    work_dir = work_dir.resolve()
    job = Job(
        backend="native",
        benchmark=benchmark,
        records=work_dir / "records.jsonl",
        metric=metric,
        base_url=endpoint.base_url,
        model_name=endpoint.model_name,
        work_dir=work_dir / "evalscope",
        result=work_dir / "result.json",
        max_tokens=max_tokens,
        concurrency=concurrency,
    )
    _write_absolute(asked, records.parent.resolve(), job.records)
    result = _run(job, log_path=work_dir / "evaluation.log")
    if result.errored or len(result.answers) != len(asked):
        raise EvaluationError(
            f"{benchmark}: {len(result.answers)} of {len(asked)} samples were answered, "
            f"{result.errored} failed, so there is no score; see {work_dir / 'evaluation.log'}. "
            "A request that is too long for the server needs a larger serve.max_model_len"
        )
    predictions = work_dir / "predictions.jsonl"
    _write_predictions(asked, result.answers, predictions)
    return Score(benchmark, result.metrics, len(asked), predictions)


def read_records(path: Path) -> list[Record]:
    """The records of a benchmark.

    Raises:
        EvaluationError: Lists the lines that are no record, repeat an id or lack their image.
    """
    found: dict[str, Record] = {}
    faults: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = Record.model_validate_json(line)
        except ValidationError as error:
            faults.append(f"line {number}: {error.errors()[0]['msg']} {error.errors()[0]['loc']}")
            continue
        if record.id in found:
            faults.append(f"line {number}: the id {record.id!r} stands above already")
        if not (path.parent / record.image).is_file():
            faults.append(f"line {number}: no image {path.parent / record.image}")
        found[record.id] = record
    if not found and not faults:
        faults = ["it is empty"]
    if faults:
        rest = f"\n… and {len(faults) - MAX_NAMED} more" if len(faults) > MAX_NAMED else ""
        raise EvaluationError(
            f"{path} is no list of {{id, image, question, answer}} records:\n"
            + "\n".join(faults[:MAX_NAMED])
            + rest
        )
    return list(found.values())


def _run(job: Job, *, log_path: Path) -> Result:
    job_path = job.result.with_name("job.json")
    job.save(job_path)
    try:
        proc.run_logged(
            [sys.executable, "-m", "vlmcore.evaluation.main", str(job_path)],
            log_path=log_path,
            on_line=lambda line: None,  # hundreds of lines that say nothing; the file has them
            env=_environment(),
        )
    except proc.ChildFailedError as error:
        raise EvaluationError(
            f"{job.benchmark}: no score from {job.base_url} for the model {job.model_name}: "
            f"{error.tail.splitlines()[-1] if error.tail else error} (whole output: {log_path})"
        ) from error
    return Result.model_validate_json(job.result.read_text(encoding="utf-8"))


def _environment() -> dict[str, str]:
    """Offline, and past a proxy of the environment, which cannot see a server on this machine."""
    no_proxy = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1", "localhost"]))
    return {**compat.child_env(), **OFFLINE, "NO_PROXY": no_proxy, "no_proxy": no_proxy}


def _write_absolute(records: list[Record], folder: Path, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            absolute = record.model_copy(update={"image": str(folder / record.image)})
            file.write(absolute.model_dump_json() + "\n")


def _write_predictions(records: list[Record], answers: list[Answer], path: Path) -> None:
    by_id = {answer.id: answer for answer in answers}
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            row = record.model_dump() | by_id[record.id].model_dump()
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
