"""What the training loop and its checkpoints ask of an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from vlmcore.dataloading.samples import PackedRow
from vlmcore.training.job import TrainJob


class Saving(Protocol):
    """A checkpoint that is being written."""

    def is_done(self, *, wait: bool) -> bool:
        """Whether every rank has written its part; call on every rank."""


class Engine(Protocol):
    """A stage's model on this rank, with optimizer and schedule; ranks call alike."""

    @property
    def trainable(self) -> Mapping[str, Mapping[str, int]]:
        """{group: {parameters, trainable}} of the whole model."""

    @property
    def learning_rate(self) -> float:
        """Of the next step: the stage's own, or a group's where each has one."""

    @property
    def data_parallel_rank(self) -> int:
        """Which part of the data this rank reads."""

    @property
    def data_parallel_size(self) -> int:
        """How many ranks read different data."""

    @property
    def leads_replica(self) -> bool:
        """Whether this rank is the first of those that read the same data."""

    def step(self, batch: Sequence[PackedRow]) -> dict[str, Any]:
        """One optimizer step over this rank's micro batches, and one of the schedule.

        Returns:
            On every rank the same: loss (a mean over the trained tokens of all data parallel
            ranks), gradient norm, `vlmcore.training.counts.counts_of` of the batch, and the largest
            memory of a rank.
        """

    def evaluate(self, batch: Sequence[PackedRow]) -> tuple[float, int]:
        """Sum of the losses and number of the trained tokens of all ranks; nothing is updated."""

    def keep_weights(self, folder: Path) -> None:
        """Writes trained weights alone into a folder."""

    def take_weights(self, folder: Path) -> None:
        """Has `write` write the weights that were kept there."""

    def save_state(self, folder: Path) -> Saving | None:
        """Writes trained weights, optimizer and schedule into a checkpoint's folder.

        Returns:
            None, or what to ask whether it is done where it goes on while the stage trains.
        """

    def load_state(self, folder: Path) -> None:
        """Takes them from there."""

    def write(self, job: TrainJob) -> None:
        """Writes the trained model folder, and the adapter where one was trained."""
