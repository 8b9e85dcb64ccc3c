"""Loss on held-out data while a stage trains, and the weights that it was lowest with."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.energon.flavors.webdataset.empty_dataset_error import EmptyDatasetError

from vlmcore import megatron_cpu
from vlmcore.dataloading.held_out import held_out_rows
from vlmcore.dataloading.samples import PackedRow
from vlmcore.dataloading.task_encoder import ConversationTaskEncoder
from vlmcore.errors import DataError
from vlmcore.training.engine import Engine
from vlmcore.training.job import TrainJob

_RECORD = "eval.json"
_NAME = re.compile(r"best_(\d{7})\Z")


@dataclass
class HeldOut:
    """Evaluates when the stage says so, and keeps the best weights where they are asked for.

    Attributes:
        after_step: Where training begins; what a killed run kept past it is forgotten.
    """

    job: TrainJob
    training: Engine
    task_encoder: ConversationTaskEncoder
    after_step: int
    best: float = field(init=False, default=float("inf"))

    def __post_init__(self) -> None:
        kept = _kept(self.job.scratch_dir)
        if dist.get_rank() == 0:
            for folder in kept:
                if _step_of(folder) > self.after_step:
                    shutil.rmtree(folder)
        dist.barrier()
        for folder in _kept(self.job.scratch_dir):
            self.best = json.loads((folder / _RECORD).read_text())["eval_loss"]

    def is_due(self, step: int) -> bool:
        """Whether to evaluate after this step: at each interval, and at the end."""
        interval = self.job.stage.eval_interval
        last = step == self.job.stage.train_iters
        return interval is not None and (last or step % interval == 0)

    def __call__(self, step: int) -> dict[str, float]:
        """Evaluates after a step; call on every rank.

        Returns:
            eval_loss, a mean over trained tokens as the training loss is, their number, and the
            seconds that it took.

        Raises:
            DataError: A dataset holds nothing out, or not enough for every data parallel rank.
        """
        began = time.perf_counter()
        total, tokens = 0.0, 0
        for batch in self._batches():
            loss, count = self.training.evaluate(batch)
            total, tokens = total + loss, tokens + count
        outcome = {"eval_loss": total / max(tokens, 1), "eval_loss_tokens": tokens}
        if self.job.stage.load_best_model_at_end and outcome["eval_loss"] < self.best:
            self._keep(step, outcome)
        return outcome | {"eval_s": time.perf_counter() - began}

    def load_best(self) -> None:
        """Puts the best weights into the model, which trains no further."""
        if self.job.stage.load_best_model_at_end:
            for folder in _kept(self.job.scratch_dir):
                self.training.take_weights(folder)

    def _batches(self) -> Iterator[list[PackedRow]]:
        """As many micro batches on every rank; what one has fewer are rows that count nothing."""
        stage = self.job.stage
        rows = held_out_rows(
            stage,
            list(self.job.datasets),
            self.task_encoder,
            data_parallel_rank=self.training.data_parallel_rank,
            data_parallel_size=self.training.data_parallel_size,
        )
        blank: PackedRow | None = None
        for _ in range(stage.eval_iters):
            batch = self._next(rows)
            fewest, most = _over_ranks(len(batch))
            if most == 0:
                return
            if blank is None and fewest == 0:
                raise self._too_little()
            blank = blank or replace(batch[0], loss_scale=torch.zeros_like(batch[0].loss_scale))
            yield batch + [blank] * (stage.num_micro_batches - len(batch))

    def _next(self, rows: Iterator[PackedRow]) -> list[PackedRow]:
        try:
            with megatron_cpu.suspended():
                return list(islice(rows, self.job.stage.num_micro_batches))
        except EmptyDatasetError as error:
            raise self._too_little() from error

    def _too_little(self) -> DataError:
        stage = self.job.stage
        return DataError(
            f"train.{stage.name}: eval_interval: the {stage.eval_split} split of "
            f"{', '.join(stage.data)} is empty for some of the {self.training.data_parallel_size} "
            f"data parallel ranks; hold out more, such as split_ratios: [9, 1, 0], or leave "
            f"eval_interval out"
        )

    def _keep(self, step: int, outcome: dict[str, float]) -> None:
        self.best = outcome["eval_loss"]
        partial = self.job.scratch_dir / "best.partial"
        leads = dist.get_rank() == 0
        if leads:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        dist.barrier()
        self.training.keep_weights(partial)
        dist.barrier()
        if leads:
            (partial / _RECORD).write_text(json.dumps(outcome | {"step": step}))
            partial.rename(partial.with_name(f"best_{step:07d}"))
            for older in _kept(self.job.scratch_dir)[:-1]:
                shutil.rmtree(older)
        dist.barrier()


def _over_ranks(count: int) -> tuple[int, int]:
    """The lowest and the highest of all ranks."""
    ends = torch.tensor([-count, count], device=megatron_cpu.device())
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    lowest, highest = ends.tolist()
    return -lowest, highest


def _kept(folder: Path) -> list[Path]:
    """Weights that are whole, oldest first; more than one only where a kill left them."""
    return sorted(path for path in folder.iterdir() if _NAME.match(path.name))


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("best_"))
