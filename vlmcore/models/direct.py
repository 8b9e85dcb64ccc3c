"""HF safetensors straight into Megatron's ranks and straight out, without a torch_dist between.

Both directions go through the weight plan, so nothing is lost here that a conversion would keep:
every element that the model asks for has a source, and every HF tensor is put together from ranks
that hold all of it, or nothing is written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    apply_factories,
    is_main_replica,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from vlmcore import megatron_cpu
from vlmcore.errors import WeightError
from vlmcore.families import family_of, read_config
from vlmcore.models.build import sharded_state_dict
from vlmcore.weights.architecture import published_shapes
from vlmcore.weights.boxes import overlap, window
from vlmcore.weights.global_tensors import HFGlobalTensors
from vlmcore.weights.plan import Region, Unit, build_plan
from vlmcore.weights.safetensors_io import parse_size, write_sharded

Shape = tuple[int, ...]


def load_hf_weights(chunks: Sequence[MegatronModule], hf_dir: Path) -> None:
    """Fills this rank's parameters from an HF folder, at any parallel layout.

    Raises:
        WeightError: The checkpoint differs from its architecture, or leaves a parameter unfilled.
    """
    source = HFGlobalTensors(hf_dir)
    with torch.no_grad():
        for part in _parts(chunks):
            assert part.data is not None
            box = source.read(part.key, part.global_offset, _box_shape(part), dtype=part.dtype)
            part.data.copy_(box.reshape(part.data.shape))


def save_hf_weights(
    chunks: Sequence[MegatronModule],
    hf_dir: Path,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "4GB",
) -> None:
    """Writes the model that all ranks hold together as HF safetensors; call on every rank.

    Args:
        chunks: This rank's parts of the model.
        hf_dir: Folder with the model's config.json.
        target: Gets the safetensors; rank 0 writes.
        dtype: Dtype of the weights; None keeps the model's.
        max_shard_size: Data of one file at most, such as 4GB.

    Raises:
        WeightError: No rank holds some element of an HF tensor.
    """
    config = read_config(hf_dir)
    shapes = published_shapes(hf_dir)
    plan = build_plan(family_of(config), config, shapes)
    collector = _Collector(list(_parts(chunks)))
    collector.check(plan.regions)
    if dist.get_rank() != 0:
        for unit in plan.units:
            collector.tensors(unit)
        dist.barrier()
        return
    homes = {key: unit for unit in plan.units for key in unit.hf_keys}
    at_hand: dict[str, Tensor] = {}  # what the last unit gave

    def read(key: str) -> Tensor:
        if key not in at_hand:
            at_hand.clear()
            at_hand.update(collector.tensors(homes[key]))
        tensor = at_hand.pop(key)
        return tensor.to(dtype or tensor.dtype).contiguous()

    target.mkdir(parents=True, exist_ok=True)
    kept = {key: dtype or collector.dtype(unit.regions[0]) for key, unit in homes.items()}
    tensors = {key: (shapes[key], kept[key]) for key in homes}
    write_sharded(target, tensors, read, max_shard_bytes=parse_size(max_shard_size))
    dist.barrier()


def _parts(chunks: Sequence[MegatronModule]) -> Iterator[ShardedTensor]:
    """The boxes of global tensors that this rank holds; their data are views of its parameters."""
    for chunk in chunks:
        state = sharded_state_dict(chunk)
        apply_factories(state)
        yield from (part for part in nested_values(state) if isinstance(part, ShardedTensor))


def _box_shape(part: ShardedTensor) -> Shape:
    return (1,) * part.prepend_axis_num + tuple(part.local_shape)


@dataclass(frozen=True)
class _Held:
    """Where a piece of a global tensor is: the box, and the rank with its index there."""

    rank: int
    index: int
    offset: Shape
    shape: Shape
    dtype: torch.dtype


class _Collector:
    """Brings boxes to rank 0 from the ranks that hold them; every rank calls alike."""

    def __init__(self, parts: list[ShardedTensor]) -> None:
        self.parts = parts
        rank = dist.get_rank()
        mine = [
            (part.key, _Held(rank, i, tuple(part.global_offset), _box_shape(part), part.dtype))
            for i, part in enumerate(parts)
            if is_main_replica(part.replica_id)
        ]
        everyone: list[list[tuple[str, _Held]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine)
        self.held: dict[str, list[_Held]] = defaultdict(list)
        for key, held in (entry for entries in everyone for entry in entries):
            self.held[key].append(held)

    def check(self, regions: Sequence[Region]) -> None:
        """Fails on every rank where some element is held by none, or by two.

        Raises:
            WeightError: Lists such tensors.
        """
        faults = []
        for region in regions:
            boxes = [overlap(region.offset, region.shape, held.offset, held.shape)
                     for held in self.held[region.mcore_key]]  # fmt: skip
            found = sum(torch.Size(b - a for a, b in zip(*box, strict=True)).numel()
                        for box in boxes if box)  # fmt: skip
            expected = torch.Size(region.shape).numel()
            if found != expected:
                keys = ", ".join(source.key for source in region.sources)
                faults.append(f"{keys}: ranks hold {found} of {expected} elements")
        if faults:
            raise WeightError("the model cannot be written:\n  " + "\n  ".join(faults))

    def dtype(self, region: Region) -> torch.dtype:
        """Dtype of the model's tensor."""
        return self.held[region.mcore_key][0].dtype

    def tensors(self, unit: Unit) -> dict[str, Tensor]:
        """On rank 0 the whole HF tensors of a unit; elsewhere nothing."""
        pieces: dict[str, list[Tensor]] = defaultdict(list)
        for region in unit.regions:
            box = self._collect(region)
            if box is not None:
                for source, piece in zip(region.sources, region.unpack(box), strict=True):
                    pieces[source.key].append(piece)
        cut = unit.regions[0].sources[0].index is not None
        return {key: torch.stack(found) if cut else found[0] for key, found in pieces.items()}

    def _collect(self, region: Region) -> Tensor | None:
        here = dist.get_rank()
        box = torch.empty(region.shape, dtype=self.dtype(region)) if here == 0 else None
        for held in self.held[region.mcore_key]:
            common = overlap(region.offset, region.shape, held.offset, held.shape)
            if common is None or here not in (0, held.rank):
                continue
            low, high = common
            piece = None
            if here == held.rank:
                data = self.parts[held.index].data
                assert data is not None
                piece = data.detach().reshape(held.shape)[window(low, high, held.offset)]
            if held.rank != 0:
                piece = _send(piece, held, [b - a for a, b in zip(low, high, strict=True)])
            if box is not None:
                assert piece is not None
                box[window(low, high, region.offset)] = piece.to(box.device)
        return box


def _send(piece: Tensor | None, held: _Held, shape: Sequence[int]) -> Tensor | None:
    """Moves a piece from its rank to rank 0."""
    if dist.get_rank() == 0:
        buffer = torch.empty(shape, dtype=held.dtype, device=megatron_cpu.device())
        dist.recv(buffer, src=held.rank)
        return buffer
    assert piece is not None
    dist.send(piece.contiguous(), dst=0)
    return None
