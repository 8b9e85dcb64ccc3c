"""The files inside artifacts that a report reads, as far as it reads them.

Whatever cannot be read becomes a sentence that says so: a page without one of its proofs is still
worth having, as long as it names what it lacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

T = TypeVar("T")


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True)


class Ledger(_Document):
    """Where the swapped model's tensors come from; `fresh`: tensor → why it starts random."""

    from_llm: int
    from_vlm: int
    fresh: dict[str, str]


class SwapProof(_Document):
    """`proof.json` of the stage `swap`."""

    text_logits_max_diff: float
    vision_max_diff: float
    missing_keys: list[str]
    unexpected_keys: list[str]
    text_class: str
    vision_class: str
    ledger: Ledger

    @property
    def passed(self) -> bool:
        """Whether nothing but the tensors that start random differs from the donors."""
        exact = self.text_logits_max_diff == 0 and self.vision_max_diff == 0
        return exact and not self.missing_keys and not self.unexpected_keys


class Conversion(_Document):
    """`conversion.json` of a stage that converts weights, or copies them in another dtype."""

    family: str
    keys_read: int
    keys_written: int
    digest: str
    tied: dict[str, str] = {}
    dropped: dict[str, str] = {}


class Precision(_Document):
    """One comparison in `precision.json`: HF against Megatron-Core logits of one sample."""

    tensor_model_parallel_size: int
    sample: str
    num_tokens: int
    max_diff: float
    mean_diff: float
    top1_agreement: float
    tolerance: float
    passed: bool


class Shards(_Document):
    """`report.json` of a dataset's shards: by split, what was written; by cause, what was not."""

    samples: dict[str, int]
    num_images: int
    shards: dict[str, list[str]]
    dropped: dict[str, int]
    examples: dict[str, list[str]]


class AuditFigures(_Document):
    """Counts of an audit; leaks are train samples with an image that is also held out."""

    duplicates: int
    near_duplicates: int
    leaks: int
    undecodable: int
    tokens: int
    tokens_are_estimated: bool


class AuditSample(_Document):
    """A sample to look at: turns of (role, text), images as data URIs, empty if unreadable."""

    split: str
    key: str
    turns: list[tuple[str, str]]
    images: list[str]


class Audit(_Document):
    """`audit.json` of a dataset's shards.

    `leaks`: the first few, (train sample, where it is held out, how alike); `plots`: SVG.
    """

    figures: AuditFigures
    leaks: list[tuple[str, str, str]]
    plots: list[str]
    shown: list[AuditSample]


class Step(_Document):
    """One line of `metrics.jsonl`."""

    step: int
    loss: float
    eval_loss: float | None = None
    learning_rate: float
    grad_norm: float
    tokens: int
    samples: int
    dropped_by_cause: dict[str, int] = {}
    packing_fill: float | None = None
    tokens_per_s: float
    samples_per_s: float
    tflops_per_rank: float
    mfu: float | None = None
    step_s: float
    largest_rank_memory_mb: float | None = None
    data_s: float


class FreezeGroup(_Document):
    """Parameters of one freeze group in `trainable.json`."""

    parameters: int
    trainable: int


class Prediction(_Document):
    """One line of `predictions.jsonl`; `image` is relative to the holdout's folder."""

    id: str
    image: str
    question: str
    answer: str
    prediction: str
    correct: bool


@dataclass(frozen=True)
class Evidence(Generic[T]):
    """What a file of a stage says, or in `absent` why the page has to do without."""

    stage: str
    content: T | None
    absent: str = ""


def read_document(folders: Mapping[str, Path], stage: str, name: str, kind: type[T]) -> Evidence[T]:
    """The JSON (or, where the name ends in .jsonl, the list of JSON lines) in a stage's artifact.

    Args:
        kind: What the JSON holds, such as `SwapProof` or `list[Precision]`.
    """
    if stage not in folders:
        return Evidence(stage, None, f"This run has no stage {stage}, so there is no {name}.")
    adapter = TypeAdapter(kind)
    try:
        data = (folders[stage] / name).read_bytes()
        if name.endswith(".jsonl"):
            data = b"[" + b",".join(line for line in data.splitlines() if line.strip()) + b"]"
        return Evidence(stage, adapter.validate_json(data))
    except (FileNotFoundError, NotADirectoryError):
        return Evidence(stage, None, f"{name} is absent from the artifact of {stage}.")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        what = f"{where}: {first['msg']}" if where else first["msg"]
        return Evidence(stage, None, f"{name} in the artifact of {stage} cannot be read: {what}.")
