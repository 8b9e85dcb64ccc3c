"""What a training stage did, from the log of its steps: figures, and the curve of its loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median

from vlmcore.report.documents import Evidence, FreezeGroup, Step, read_document
from vlmcore.report.loss_plot import loss_plot_svg

_FINAL_STEPS = 10
_WARM_UP = 0.1  # of all steps: loaders fill their buffers, kernels are chosen, memory is taken


@dataclass(frozen=True)
class Speed:
    """What a step cost: medians over the steps after the warm-up, memory over all of them."""

    first_step: int
    last_step: int
    step_s: float
    samples_per_s: float
    tokens_per_s: float
    tflops_per_rank: float
    mfu: float | None
    data_share: float
    largest_memory_mb: float | None


@dataclass(frozen=True)
class Training:
    """What one training stage did; figures are over all of its steps."""

    stage: str
    steps: Evidence[list[Step]]
    groups: Evidence[dict[str, FreezeGroup]]
    plot: str = ""
    final_loss: float = 0.0
    num_final: int = 0
    first_loss: float = 0.0
    samples: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    fill: float | None = None
    tokens: int = 0
    speed: Speed | None = None


def training_of(folders: Mapping[str, Path], stage: str) -> Training:
    """A stage's log, summed up; what its artifact lacks is named."""
    steps = read_document(folders, stage, "metrics.jsonl", list[Step])
    groups = read_document(folders, stage, "trainable.json", dict[str, FreezeGroup])
    if not steps.content:
        return Training(stage, steps, groups)
    rows = steps.content
    final = rows[-_FINAL_STEPS:]
    fills = [row.packing_fill for row in rows if row.packing_fill is not None]
    return Training(
        stage,
        steps,
        groups,
        plot=loss_plot_svg([row.model_dump(exclude_none=True) for row in rows], title=stage),
        first_loss=rows[0].loss,
        final_loss=fmean(row.loss for row in final),
        num_final=len(final),
        samples=sum(row.samples for row in rows),
        dropped=_dropped(rows),
        fill=fmean(fills) if fills else None,
        tokens=sum(row.tokens for row in rows),
        speed=_speed(rows),
    )


def _speed(rows: Sequence[Step]) -> Speed:
    settled = rows[max(1, round(_WARM_UP * len(rows))) :] or rows
    shares = [row.mfu for row in settled if row.mfu is not None]
    memory = [row.largest_rank_memory_mb for row in rows if row.largest_rank_memory_mb is not None]
    return Speed(
        first_step=settled[0].step,
        last_step=settled[-1].step,
        step_s=median(row.step_s for row in settled),
        samples_per_s=median(row.samples_per_s for row in settled),
        tokens_per_s=median(row.tokens_per_s for row in settled),
        tflops_per_rank=median(row.tflops_per_rank for row in settled),
        mfu=median(shares) if shares else None,
        data_share=median(row.data_s / row.step_s for row in settled),
        largest_memory_mb=max(memory, default=None),
    )


def _dropped(rows: Sequence[Step]) -> Mapping[str, int]:
    """Samples that were left out, by cause."""
    causes: Counter[str] = Counter()
    for row in rows:
        causes.update(row.dropped_by_cause)
    return dict(causes.most_common())
