"""How ranks share a transformers model: whole on each (DDP), or in parts (FSDP2, DeepSpeed ZeRO).

Each way runs forward and backward of a row and the update, and writes and reads its own part of a
checkpoint. Gradients are means over ranks everywhere: a loss is a part of the global one, times the
number of ranks.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from vlmcore import megatron_cpu
from vlmcore.errors import TrainError
from vlmcore.recipe.train_stage import TrainStage
from vlmcore.training.own_weights import OwnWeights, put_in
from vlmcore.training.packed_model import PackedModel, RowLosses
from vlmcore.training.transformers_model import MODEL, trained_names

# Groups of parameters for the optimizer, made once weights lie where they stay.
Grouping = Callable[[PackedModel], list[dict[str, Any]]]


class Sharding(ABC):
    """A model and its optimizer over all ranks.

    Attributes:
        module: What is called with a row.
        optimizer: Whose groups hold the learning rates.
    """

    module: Any
    optimizer: Optimizer

    def forward(self, inputs: Mapping[str, Tensor]) -> RowLosses:
        """Losses of a row."""
        losses: RowLosses = self.module(**inputs)
        return losses

    @abstractmethod
    def row(self, *, last: bool) -> contextlib.AbstractContextManager[object]:
        """Around forward and backward of a row; ranks add up gradients at the last one alone."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a row."""

    @abstractmethod
    def update(self) -> float:
        """Clips, updates, forgets the gradients; gives their norm before clipping."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes trained weights and the optimizer's state."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Takes them from there."""

    @abstractmethod
    def gathered(self) -> dict[str, Tensor]:
        """On rank 0 whole tensors of all that trained, by name in the transformers model."""


class _Torch(Sharding):
    """What DDP and FSDP2 have in common: torch's own optimizer and checkpoints."""

    def __init__(self, packed: PackedModel, grouping: Grouping, stage: TrainStage) -> None:
        self.module = packed
        self.optimizer = _adamw(grouping(packed), stage)
        self.max_norm = stage.clip_grad or float("inf")

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self) -> float:
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        norm: Any = torch.nn.utils.clip_grad_norm_(weights, self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def save(self, folder: Path) -> None:
        dcp.save(self._state(), checkpoint_id=folder / "state")

    def load(self, folder: Path) -> None:
        state = self._state()
        dcp.load(state, checkpoint_id=folder / "state")
        set_state_dict(
            self.module,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(ignore_frozen_params=True, strict=False),
        )

    def gathered(self) -> dict[str, Tensor]:
        options = StateDictOptions(
            ignore_frozen_params=True, full_state_dict=True, cpu_offload=True
        )
        state: Any = get_model_state_dict(self.module, options=options)
        return {name.removeprefix(MODEL): tensor for name, tensor in state.items()}

    def _state(self) -> dict[str, Any]:
        options = StateDictOptions(ignore_frozen_params=True)
        model, optimizer = get_state_dict(self.module, self.optimizer, options=options)
        return {"model": model, "optimizer": optimizer}


class Replicas(_Torch):
    """The whole model on every rank; what trains is fp32, computed with under autocast."""

    def __init__(self, packed: PackedModel, grouping: Grouping, stage: TrainStage) -> None:
        for _, weight in trained_names(packed):
            weight.data = weight.data.float()
        super().__init__(packed, grouping, stage)
        self.dtype = packed.dtype
        if dist.get_world_size() > 1:
            self.module = DistributedDataParallel(
                packed, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    @contextlib.contextmanager
    def row(self, *, last: bool) -> Any:
        quiet = isinstance(self.module, DistributedDataParallel) and not last
        with self.module.no_sync() if quiet else contextlib.nullcontext():
            yield

    def forward(self, inputs: Mapping[str, Tensor]) -> RowLosses:
        place, half = megatron_cpu.device().type, self.dtype != torch.float32
        with torch.autocast(place, dtype=self.dtype, enabled=half):
            return super().forward(inputs)


class Fsdp(_Torch):
    """Each rank holds a share of every weight; decoder layers are gathered one by one.

    The vision side is gathered as a whole: ranks whose rows hold other kinds of media would wait
    for each other if its layers were.
    """

    def __init__(
        self, packed: PackedModel, grouping: Grouping, stage: TrainStage, own: OwnWeights
    ) -> None:
        packed.float()  # weights of one group share a dtype, and what trains needs fp32
        policy = MixedPrecisionPolicy(param_dtype=packed.dtype, reduce_dtype=torch.float32)
        for layer in packed.decoder.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(packed, mp_policy=policy)
        for name, weight in packed.named_parameters():
            _fill_share(weight, name.removeprefix(MODEL), own)
        super().__init__(packed, grouping, stage)

    @contextlib.contextmanager
    def row(self, *, last: bool) -> Any:
        self.module.set_requires_gradient_sync(last)
        yield


@torch.no_grad()
def _fill_share(weight: Any, name: str, own: OwnWeights) -> None:
    """Has this rank read its rows of a weight; FSDP2 deals them out as `torch.chunk` does."""
    share = torch.empty_like(weight.to_local(), device=megatron_cpu.device())
    rows = weight.shape[0]
    before = min(dist.get_rank() * -(-rows // dist.get_world_size()), rows)
    own.fill(name, share, first=before * (weight.numel() // rows))
    put_in(
        weight,
        DTensor.from_local(
            share,
            weight.device_mesh,
            weight.placements,
            run_check=False,
            shape=weight.shape,
            stride=weight.stride(),
        ),
    )


class Zero(Sharding):
    """DeepSpeed's engine: ZeRO-2 shares out gradients and the optimizer, ZeRO-3 weights too."""

    def __init__(
        self, packed: PackedModel, grouping: Grouping, stage: TrainStage, own: OwnWeights | None
    ) -> None:
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        if not torch.cuda.is_available():
            # its shared-memory reduction is compiled for minutes in the first run
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist.get_backend(), verbose=False)
        buffers = {name: value.clone() for name, value in packed.named_buffers()}
        self.in_parts = own is not None
        optimizer = _adamw(grouping(packed), stage)  # before: weights in parts have no shape
        if own is not None:
            _cut(packed, stage, own)
        self.module, self.optimizer, *_ = deepspeed.initialize(
            model=packed, optimizer=optimizer, config=zero_config(stage)
        )
        for name, value in packed.named_buffers():  # rotary frequencies must not be rounded
            value.data = buffers[name].to(value.device)

    @contextlib.contextmanager
    def row(self, *, last: bool) -> Any:
        self.module.set_gradient_accumulation_boundary(last)
        yield

    def forward(self, inputs: Mapping[str, Tensor]) -> RowLosses:
        if self.in_parts and any("video" in name for name in inputs):
            raise TrainError(
                "a row holds a video: under deepspeed zero3 ranks gather the vision side layer by "
                "layer, and those without a video would wait for ever; use fsdp or zero2"
            )
        return super().forward(inputs)

    def backward(self, loss: Tensor) -> None:
        self.module.backward(loss, scale_wrt_gas=False)

    def update(self) -> float:
        self.module.step()
        return float(self.module.get_global_grad_norm())

    def save(self, folder: Path) -> None:
        self.module.save_checkpoint(
            str(folder / "state"), tag="zero", exclude_frozen_parameters=True
        )

    def load(self, folder: Path) -> None:
        self.module.load_checkpoint(str(folder / "state"), tag="zero", load_module_strict=False)

    def gathered(self) -> dict[str, Tensor]:
        import deepspeed

        whole = {}
        for name, weight in trained_names(self.module.module):
            with deepspeed.zero.GatheredParameters([weight], enabled=self.in_parts):
                if dist.get_rank() == 0:
                    whole[name] = weight.detach().cpu().clone()
        return whole


def _cut(packed: PackedModel, stage: TrainStage, own: OwnWeights) -> None:
    """Has DeepSpeed deal out weight after weight; rank 0 reads each, and none holds two whole."""
    import deepspeed

    place, dtype = megatron_cpu.device(), getattr(torch, stage.torch_dtype)
    first: Any = None
    for name, weight in packed.named_parameters():
        whole = torch.empty_like(weight, dtype=dtype, device=place)
        if dist.get_rank() == 0:  # whose values DeepSpeed hands to all
            own.fill(name.removeprefix(MODEL), whole)
        put_in(weight, whole)
        if first is None:
            first = weight
            deepspeed.zero.Init(
                module=torch.nn.ParameterList([weight]), config_dict_or_path=zero_config(stage)
            )
        else:
            first.convert_to_zero_parameters([weight])


def zero_config(stage: TrainStage) -> dict[str, Any]:
    """DeepSpeed's config of a stage."""
    level, _, offload = (stage.deepspeed or "").removeprefix("zero").partition("_")
    on_gpu = torch.cuda.is_available()
    zero: dict[str, Any] = {"stage": int(level), "overlap_comm": on_gpu}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
        if level == "3":
            zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "train_micro_batch_size_per_gpu": 1,  # a row
        "gradient_accumulation_steps": stage.num_micro_batches,
        "gradient_clipping": stage.clip_grad,
        "bf16": {"enabled": stage.torch_dtype == "bfloat16"},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on a CPU too
        "steps_per_print": 10**9,
    }


def _adamw(groups: list[dict[str, Any]], stage: TrainStage) -> AdamW:
    betas = (stage.adam_beta1, stage.adam_beta2)
    return AdamW(groups, betas=betas, eps=stage.adam_eps, fused=True)
