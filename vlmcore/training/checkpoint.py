"""Periodic checkpoints that a killed run goes on from exactly, and the final weights."""

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
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.energon.savable_loader import SavableDataLoader

from vlmcore.models.build import sharded_state_dict
from vlmcore.recipe.train_stage import TrainStage
from vlmcore.training.model import Training

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
        training: Training,
        stage: TrainStage,
        loader: SavableDataLoader[Any],
    ) -> None:
        self.folder = folder
        self.training = training
        self.keep = stage.save_total_limit
        self.layout = stage.layout
        # single layers of a stack may train, but it is saved as one tensor
        self.whole = bool(stage.trainable_parameters_regex)
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
        if _leads_replica():
            rank = parallel_state.get_data_parallel_rank()
            torch.save(self.loader.save_state_rank(), partial / f"loader_{rank}.pt")
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
        step = int(newest.name.removeprefix("iter_"))
        loaded = dist_checkpointing.load(self._state(step, loading=True), str(newest))
        for i, module in enumerate(self.training.modules):
            module.load_state_dict(loaded[f"model{i}"], strict=False)
        with torch.no_grad():  # GroupStepAdam's moments are copied in place
            self.training.optimizer.load_state_dict(loaded["optimizer"])
        self.training.schedule.load_state_dict(loaded["schedule"])
        if loaded["layout"] == str(self.layout):
            rng = newest / f"rng_{dist.get_rank()}.pt"
            _set_rng_state(torch.load(rng, weights_only=False))
        if len(list(newest.glob("loader_*.pt"))) == parallel_state.get_data_parallel_world_size():
            position = newest / f"loader_{parallel_state.get_data_parallel_rank()}.pt"
            self.loader.restore_state_rank(torch.load(position, weights_only=False))
        elif dist.get_rank() == 0:
            logger.warning("%s: read by another number of ranks; the data begin anew", newest)
        return step

    def _state(self, step: int, *, loading: bool) -> dict[str, Any]:
        models = {
            f"model{i}": self._trained(module) for i, module in enumerate(self.training.modules)
        }
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        optimizer = self.training.optimizer.sharded_state_dict(
            models, is_loading=loading, metadata=metadata
        )
        return {
            **models,
            "optimizer": optimizer,
            "schedule": self.training.schedule.state_dict(),
            "step": step,
            "layout": str(self.layout),
        }

    def _trained(self, module: MegatronModule) -> dict[str, Any]:
        """The chunk's state without frozen weights, whose layers share one tensor."""
        state = sharded_state_dict(module)
        frozen = {name for name, weight in module.named_parameters() if not weight.requires_grad}
        if self.whole:
            return state
        return {name: entry for name, entry in state.items() if name not in frozen}


def _leads_replica() -> bool:
    """Whether this rank is the first of those that read the same data."""
    return not (
        parallel_state.get_tensor_model_parallel_rank()
        or parallel_state.get_pipeline_model_parallel_rank()
        or parallel_state.get_context_parallel_rank()
    )


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
