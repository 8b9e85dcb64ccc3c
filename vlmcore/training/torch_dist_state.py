"""The megatron engine's part of a checkpoint: trained weights, optimizer and schedule, sharded.

Frozen weights stay out of it: they come from the model folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule

from vlmcore.models.build import sharded_state_dict

if TYPE_CHECKING:
    from vlmcore.training.model import Training


class AsyncSaving:
    """A checkpoint that a process of each rank writes, from a copy of what was there at its start.

    A forked process sees the memory of that moment; what lies on a GPU is copied to the host first.
    """

    def __init__(self, request: AsyncRequest) -> None:
        self._calls = AsyncCallsQueue()
        self._calls.schedule_async_request(request)

    def is_done(self, *, wait: bool) -> bool:
        """Whether every rank has written its part; call on every rank."""
        self._calls.maybe_finalize_async_calls(blocking=wait)
        return self._calls.get_num_unfinalized_calls() == 0


def training_state(training: Training, *, loading: bool) -> dict[str, Any]:
    """What Megatron saves and loads as one: trained weights, optimizer, schedule and layout.

    Args:
        training: A stage laid out over the ranks.
        loading: Whether it is to be filled from a checkpoint.

    Returns:
        Sharded tensors under `model0` … (a chunk each) and `optimizer`, plain values beside them.
    """
    models = _weights(training)
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    return {
        **models,
        "optimizer": training.optimizer.sharded_state_dict(
            models, is_loading=loading, metadata=metadata
        ),
        "schedule": training.schedule.state_dict(),
        "layout": str(training.stage.layout),
    }


def save_state(training: Training, folder: Path) -> AsyncSaving | None:
    """Writes what any layout can take up again."""
    torch.save(get_cuda_rng_tracker().get_states(), _tracker(folder))
    state, beside = training_state(training, loading=False), training.stage.async_save
    request = dist_checkpointing.save(state, str(folder), async_sharded_save=beside)
    return None if request is None else AsyncSaving(request)


def load_state(training: Training, folder: Path) -> None:
    """Takes up what `save_state` wrote; at another layout the ranks' generators begin anew."""
    loaded = dist_checkpointing.load(training_state(training, loading=True), str(folder))
    _put(training, loaded)
    with torch.no_grad():  # GroupStepAdam's moments are copied in place
        training.optimizer.load_state_dict(loaded["optimizer"])
    training.schedule.load_state_dict(loaded["schedule"])
    if loaded["layout"] == str(training.stage.layout) and _tracker(folder).exists():
        get_cuda_rng_tracker().set_states(torch.load(_tracker(folder), weights_only=False))


def save_weights(training: Training, folder: Path) -> None:
    """Writes the trained weights alone."""
    dist_checkpointing.save(_weights(training), str(folder))


def load_weights(training: Training, folder: Path) -> None:
    """Puts them back."""
    _put(training, dist_checkpointing.load(_weights(training), str(folder)))


def _put(training: Training, loaded: dict[str, Any]) -> None:
    for i, module in enumerate(training.modules):
        module.load_state_dict(loaded[f"model{i}"], strict=False)


def _tracker(folder: Path) -> Path:
    return folder / f"tracker_{dist.get_rank()}.pt"


def _weights(training: Training) -> dict[str, Any]:
    # single layers of a stack may train, but it is saved as one tensor
    whole = bool(training.stage.trainable_parameters_regex)
    return {
        f"model{i}": sharded_state_dict(module) if whole else _trained(module)
        for i, module in enumerate(training.modules)
    }


def _trained(module: MegatronModule) -> dict[str, Any]:
    """The chunk's state without frozen weights, whose layers share one tensor."""
    state = sharded_state_dict(module)
    frozen = {name for name, weight in module.named_parameters() if not weight.requires_grad}
    return {name: entry for name, entry in state.items() if name not in frozen}
