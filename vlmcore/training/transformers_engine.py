"""The transformers engine: a family as transformers runs it, on ranks that read their own data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vlmcore import megatron_cpu
from vlmcore.dataloading.samples import PackedRow
from vlmcore.errors import TrainError
from vlmcore.families import Family, family_of, read_config
from vlmcore.recipe.train_stage import TrainStage
from vlmcore.training.counts import counts_of, num_real
from vlmcore.training.freeze_groups import group_rates
from vlmcore.training.job import TrainJob
from vlmcore.training.own_weights import OwnWeights
from vlmcore.training.packed_model import PackedModel, RowLosses, row_inputs
from vlmcore.training.schedule import learning_rate
from vlmcore.training.sharding import Fsdp, Replicas, Sharding, Zero
from vlmcore.training.throughput import LARGEST_MEMORY, sums_and_memory
from vlmcore.training.transformers_model import (
    build,
    trainable_table,
    trained_names,
    write_folder,
)

_POSITION = "position.json"
_KEPT = "weights.pt"


def prepare(
    stage: TrainStage, model_dir: Path, *, idle_inputs: Mapping[str, Tensor] | None = None
) -> TransformersTraining:
    """Everything but the data; call inside `data_parallel_ranks` on every rank.

    Args:
        stage: What to train, and how.
        model_dir: HF model folder to start from.
        idle_inputs: What a vision side that trains looks at where a row has no image.

    Raises:
        TrainError: A folder of another form, nothing trainable, or a tuner that cannot run here.
        WeightError: The folder and its architecture do not fit.
    """
    if not (model_dir / "config.json").exists():
        raise TrainError(
            f"train.{stage.name}: {model_dir} is no HF model folder, which engine transformers "
            f"reads; convert it first: vlmflow convert to-hf"
        )
    packed, own = build(stage, model_dir, idle_inputs=idle_inputs or {})
    return TransformersTraining(packed, stage, family_of(read_config(model_dir)), own)


class TransformersTraining:
    """A stage's model on this rank, with optimizer and schedule.

    Args:
        packed: From `build`.
        stage: How it is trained, and how ranks share it.
        family: The model's.
        own: From `build`.
    """

    def __init__(
        self, packed: PackedModel, stage: TrainStage, family: Family, own: OwnWeights | None
    ) -> None:
        self.stage = stage
        self.trainable = trainable_table(packed.model, family)
        self.num_layers = len(packed.decoder.layers)
        self.weighs_routers = bool(stage.moe_aux_loss_coeff or stage.moe_z_loss_coeff) and (
            packed.has_experts
        )
        self.sharding = _share(packed, stage, family, own)
        self.peaks = [group["lr"] for group in self.sharding.optimizer.param_groups]
        self.done = 0
        self.taken: Path | None = None
        self._set_rates()

    @property
    def learning_rate(self) -> float:
        """Of the next step: the stage's own, or a group's where each has one."""
        rates = [self._rate(peak) for peak in self.peaks]
        shared = self._rate(self.stage.learning_rate)
        return shared if shared in rates else rates[0]

    @property
    def data_parallel_rank(self) -> int:
        """Which part of the data this rank reads."""
        return dist.get_rank()

    @property
    def data_parallel_size(self) -> int:
        """How many ranks read different data."""
        return dist.get_world_size()

    @property
    def leads_replica(self) -> bool:
        """Whether this rank is the first of those that read the same data: there is no other."""
        return True

    def step(self, batch: Sequence[PackedRow]) -> dict[str, Any]:
        """One optimizer step over this rank's rows, each a micro batch, and one of the schedule.

        Returns:
            On every rank the same: loss (a mean over trained tokens of all ranks), gradient norm,
            the routers' losses, counts over all ranks, and the largest memory of a rank.
        """
        counts = counts_of(batch)
        place = megatron_cpu.device()
        sums = torch.zeros(3, dtype=torch.float64, device=place)
        for i, row in enumerate(batch):
            with self.sharding.row(last=i == len(batch) - 1):
                losses = self.sharding.forward(row_inputs(row, place))
                self.sharding.backward(self._part_of_loss(losses, row, counts))
            sums += torch.stack([losses.total, losses.balance, losses.z]).detach().double()
        grad_norm = self.sharding.update()
        self.done += 1
        self._set_rates()
        sums, memory = sums_and_memory(sums)
        outcome = {
            "loss": float(sums[0]) / max(counts["loss_tokens"], 1),
            "grad_norm": grad_norm,
            "updated": True,
            LARGEST_MEMORY: memory,
            **counts,
        }
        if self.weighs_routers:
            seen = self.num_layers * len(batch) * dist.get_world_size()
            outcome |= {"aux_loss": float(sums[1]) / seen, "z_loss": float(sums[2]) / seen}
        return outcome

    @torch.no_grad()
    def evaluate(self, batch: Sequence[PackedRow]) -> tuple[float, int]:
        """Sum of the losses and number of the trained tokens of all ranks; nothing is updated."""
        place = megatron_cpu.device()
        total = torch.zeros((), dtype=torch.float64, device=place)
        self.sharding.module.eval()
        for row in batch:
            total += self.sharding.forward(row_inputs(row, place)).total.double()
        self.sharding.module.train()
        dist.all_reduce(total)
        return float(total), counts_of(batch)["loss_tokens"]

    def keep_weights(self, folder: Path) -> None:
        """Writes trained weights alone into a folder."""
        trained = self.sharding.gathered()
        if dist.get_rank() == 0:
            torch.save(trained, folder / _KEPT)
        dist.barrier()

    def take_weights(self, folder: Path) -> None:
        """Has `write` write the weights that were kept there."""
        self.taken = folder / _KEPT

    def save_state(self, folder: Path) -> None:
        """Writes trained weights, optimizer and schedule into a checkpoint's folder."""
        self.sharding.save(folder)
        if dist.get_rank() == 0:
            position = {"done": self.done, "ranks": dist.get_world_size()}
            (folder / _POSITION).write_text(json.dumps(position))

    def load_state(self, folder: Path) -> None:
        """Takes them from there; DeepSpeed's only where as many ranks wrote them.

        Raises:
            TrainError: Another number of ranks wrote a checkpoint of DeepSpeed's.
        """
        position = json.loads((folder / _POSITION).read_text())
        if self.stage.deepspeed is not None and position["ranks"] != dist.get_world_size():
            raise TrainError(
                f"train.{self.stage.name}: {folder} was written by {position['ranks']} ranks under "
                f"deepspeed, which cannot go on with {dist.get_world_size()}; set nproc_per_node "
                f"back, or remove the checkpoint"
            )
        self.sharding.load(folder)
        self.done = position["done"]
        self._set_rates()

    def write(self, job: TrainJob) -> None:
        """Writes the trained HF model folder, and the adapter where one was trained."""
        trained = self.sharding.gathered() if self.taken is None else {}
        if dist.get_rank() == 0:
            write_folder(job, trained if self.taken is None else torch.load(self.taken))
        dist.barrier()

    def _part_of_loss(self, losses: RowLosses, row: PackedRow, counts: Mapping[str, int]) -> Tensor:
        """A row's part of the loss of the step, times the ranks, over which gradients are means."""
        loss = losses.total / max(counts["loss_tokens"], 1)
        if self.weighs_routers:
            routers = (
                self.stage.moe_aux_loss_coeff * losses.balance
                + self.stage.moe_z_loss_coeff * losses.z
            )
            loss = loss + routers * num_real(row) / max(counts["tokens"], 1)
        return loss * dist.get_world_size()

    def _rate(self, peak: float) -> float:
        return learning_rate(self.stage, self.done, peak=peak)

    def _set_rates(self) -> None:
        for group, peak in zip(self.sharding.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = self._rate(peak)


def _share(
    packed: PackedModel, stage: TrainStage, family: Family, own: OwnWeights | None
) -> Sharding:
    """The model over the ranks, as the stage says."""

    def grouping(model: PackedModel) -> list[dict[str, Any]]:
        return param_groups(model, stage, family)

    if stage.deepspeed is not None:
        return Zero(packed, grouping, stage, own)
    return Replicas(packed, grouping, stage) if own is None else Fsdp(packed, grouping, stage, own)


def param_groups(packed: PackedModel, stage: TrainStage, family: Family) -> list[dict[str, Any]]:
    """Trained parameters by peak rate and weight decay; biases and norms do not decay."""
    found: dict[tuple[float, float], list[Tensor]] = {}
    rates = group_rates(stage)
    for name, weight in trained_names(packed):
        peak = rates[family.group_of(name)] or stage.learning_rate
        decay = stage.weight_decay if weight.ndim > 1 else 0.0
        found.setdefault((peak, decay), []).append(weight)
    return [
        {"params": weights, "lr": peak, "weight_decay": decay}
        for (peak, decay), weights in found.items()
    ]
