"""Periodic checkpoints that a killed run goes on from exactly, and the final weights."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.energon.savable_loader import SavableDataLoader

from vlmcore.models.build import sharded_state_dict

_NAME = re.compile(r"iter_(\d{7})\Z")


class Checkpointer:
    """Saves and restores everything that decides the next step: weights, optimizer, schedule, RNG
    and the data loader's position.

    A checkpoint is written under a temporary name and renamed once every rank is done, so whatever
    carries the final name is whole. The newest alone is kept.
    """

    def __init__(
        self,
        folder: Path,
        *,
        model: DistributedDataParallel,
        optimizer: MegatronOptimizer,
        schedule: OptimizerParamScheduler,
        loader: SavableDataLoader[Any],
    ) -> None:
        self.folder = folder
        self.model = model
        self.optimizer = optimizer
        self.schedule = schedule
        self.loader = loader

    def save(self, step: int) -> None:
        """Saves after `step` optimizer steps."""
        partial = self.folder / f"iter_{step:07d}.partial"
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        dist_checkpointing.save(self._state(step, loading=False), str(partial))
        torch.save(_rng_state(), partial / f"rng_{dist.get_rank()}.pt")
        torch.save(self.loader.save_state_rank(), partial / f"loader_{dist.get_rank()}.pt")
        dist.barrier()
        if dist.get_rank() == 0:
            partial.rename(partial.with_suffix(""))
            for older in _finished(self.folder)[:-1]:
                shutil.rmtree(older)
        dist.barrier()

    def restore(self) -> int:
        """Restores the newest checkpoint; gives its step, 0 where there is none."""
        finished = _finished(self.folder)
        if not finished:
            return 0
        newest = finished[-1]
        step = int(newest.name.removeprefix("iter_"))
        loaded = dist_checkpointing.load(self._state(step, loading=True), str(newest))
        self.model.module.load_state_dict(loaded["model"], strict=True)
        with torch.no_grad():  # GroupStepAdam's moments are copied in place
            self.optimizer.load_state_dict(loaded["optimizer"])
        self.schedule.load_state_dict(loaded["schedule"])
        rank = dist.get_rank()
        _set_rng_state(torch.load(newest / f"rng_{rank}.pt", weights_only=False))
        self.loader.restore_state_rank(torch.load(newest / f"loader_{rank}.pt", weights_only=False))
        return step

    def _state(self, step: int, *, loading: bool) -> dict[str, Any]:
        model = sharded_state_dict(self.model.module)
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        optimizer = self.optimizer.sharded_state_dict(
            {"model": model}, is_loading=loading, metadata=metadata
        )
        return {
            "model": model,
            "optimizer": optimizer,
            "schedule": self.schedule.state_dict(),
            "step": step,
        }


def _finished(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.iterdir() if _NAME.match(path.name))


def _rng_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])
