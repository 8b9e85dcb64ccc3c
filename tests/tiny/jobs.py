"""Whole training jobs on tiny models: their folder, their run, what they leave, their end."""

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.tiny.megatron import stage
from vlmcore.training.job import METRICS, TrainJob
from vlmcore.training.launch import launch

MODULE = "vlmcore.training.main"
FIELDS = {"log_interval": 1, "learning_rate": 1e-3, "max_length": 64, "packing_buffer_size": 24}

Run = Callable[..., Path]


def write_job(
    folder: Path,
    *,
    model_dir: Path,
    dataset: Path,
    cache_dir: Path | None = None,
    **fields: Any,
) -> TrainJob:
    """The job of a folder, as its `job.json`; scratch files of an earlier one stay."""
    (folder / "scratch").mkdir(parents=True, exist_ok=True)
    job = TrainJob(
        stage=stage(**(FIELDS | fields)),
        model_dir=model_dir,
        datasets={dataset: 1.0},
        output_dir=folder / "output",
        scratch_dir=folder / "scratch",
        cache_dir=cache_dir,
    )
    (folder / "job.json").write_text(job.model_dump_json())
    return job


def run_job(
    folder: Path,
    on_step: Callable[[int], None] = lambda _: None,
    *,
    model_dir: Path,
    dataset: Path,
    **fields: Any,
) -> Path:
    """Writes the job and trains to its end, on one machine; the folder."""
    job = write_job(folder, model_dir=model_dir, dataset=dataset, **fields)
    launch(
        MODULE,
        ["--job", str(folder / "job.json")],
        nproc_per_node=job.stage.nproc_per_node,
        log_path=folder / "log",
        on_progress=lambda values: on_step(values["step"]),
    )
    return folder


def metrics(folder: Path) -> list[dict[str, Any]]:
    """A row per step."""
    return [json.loads(line) for line in (folder / "output" / METRICS).read_text().splitlines()]


def processes(folder: Path, variable: str) -> list[int]:
    """The job's processes with this in their environment, such as `RANK=1`; workers have it too."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(folder / "job.json").encode() in command and variable.encode() in variables:
            found.append(int(process.name))
    return sorted(found)


def kill(pids: Iterable[int]) -> None:
    """kill -9."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # a worker that has ended since
            os.kill(pid, signal.SIGKILL)
