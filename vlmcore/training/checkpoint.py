"""Periodic checkpoints that a killed run goes on from exactly, whatever the engine."""

from __future__ import annotations

import logging
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.energon.savable_loader import SavableDataLoader

from vlmcore.recipe.train_stage import TrainStage
from vlmcore.training.engine import Engine, Saving

logger = logging.getLogger(__name__)
_NAME = re.compile(r"iter_(\d{7})\Z")


class Checkpointer:
    """Saves and restores everything that decides the next step: weights, optimizer, schedule, RNG
    and the data loader's position.

    A checkpoint is written under a temporary name and renamed once every rank is done, so whatever
    carries the final name is whole. Frozen weights stay out of it: they come from the model folder.

    Args:
        folder: Gets the checkpoints.
        training: What is saved of the model.
        stage: Says how many checkpoints are kept.
        loader: Its position is saved by each data parallel rank.
    """

    def __init__(
        self,
        folder: Path,
        *,
        training: Engine,
        stage: TrainStage,
        loader: SavableDataLoader[Any],
    ) -> None:
        self.folder = folder
        self.training = training
        self.keep = stage.save_total_limit
        self.layout = str(stage.layout)
        self.loader = loader
        self._unnamed: tuple[Path, Saving | None] | None = None

    def save(self, step: int) -> None:
        """Saves after `step` optimizer steps; `publish` ends what goes on beside training."""
        self.publish(wait=True)
        partial = self.folder / f"iter_{step:07d}.partial"
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        saving = self.training.save_state(partial)
        torch.save(_rng_state() | {"layout": self.layout}, partial / f"rng_{dist.get_rank()}.pt")
        if self.training.leads_replica:
            rank = self.training.data_parallel_rank
            torch.save(self.loader.save_state_rank(), partial / f"loader_{rank}.pt")
        self._unnamed = partial, saving
        self.publish(wait=saving is None)

    def publish(self, *, wait: bool) -> None:
        """Gives the last checkpoint its name once it is whole; call on every rank."""
        if self._unnamed is None:
            return
        partial, saving = self._unnamed
        if saving is not None and not saving.is_done(wait=wait):
            return
        self._unnamed = None
        dist.barrier()
        if dist.get_rank() == 0:
            partial.rename(partial.with_suffix(""))
            for older in _finished(self.folder)[: -self.keep]:
                shutil.rmtree(older)
        dist.barrier()

    def restore(self) -> int:
        """Restores the newest checkpoint; gives its step, 0 where there is none.

        Another layout takes it too. Its generators then begin anew, and where another number of
        data parallel ranks read, so does the order of the data.
        """
        finished = _finished(self.folder)
        if not finished:
            return 0
        newest = finished[-1]
        self.training.load_state(newest)
        rng = newest / f"rng_{dist.get_rank()}.pt"
        if len(list(newest.glob("rng_*.pt"))) == dist.get_world_size():
            state = torch.load(rng, weights_only=False)
            if state["layout"] == self.layout:
                _set_rng_state(state)
        if len(list(newest.glob("loader_*.pt"))) == self.training.data_parallel_size:
            position = newest / f"loader_{self.training.data_parallel_rank}.pt"
            self.loader.restore_state_rank(torch.load(position, weights_only=False))
        elif dist.get_rank() == 0:
            logger.warning("%s: read by another number of ranks; the data begin anew", newest)
        return int(newest.name.removeprefix("iter_"))


def _finished(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.iterdir() if _NAME.match(path.name))


def _rng_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
