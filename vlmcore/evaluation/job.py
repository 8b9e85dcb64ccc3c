"""What a scoring child process is told and what it answers, as two JSON files."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(self.model_dump_json(indent=2), encoding="utf-8")


class Record(_Message):
    """One question of a benchmark; `image` is a path."""

    id: str
    image: str
    question: str
    answer: str


class Job(_Message):
    """One benchmark to ask of one served model. `records`: JSONL of `Record`, absolute images."""

    backend: Literal["native"]
    benchmark: str
    records: Path
    metric: str
    base_url: str
    model_name: str
    work_dir: Path
    result: Path
    max_tokens: int
    concurrency: int


class Answer(_Message):
    """What the model said to one record, and whether that is right."""

    id: str
    prediction: str
    correct: bool


class Result(_Message):
    """`errored`: samples without an answer; a score that leaves them out is none."""

    metrics: dict[str, float]
    num_samples: int
    errored: int
    answers: list[Answer]
