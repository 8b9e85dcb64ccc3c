"""The weight plan: a family's rows spelled out for one checkpoint, with the coverage ledger.

A plan is a list of regions. Each region pairs a few pieces of HF tensors with one box of one global
Megatron tensor. Building the plan *is* the proof of coverage: every HF tensor is consumed exactly
once and every Megatron tensor is tiled exactly once, or `build_plan` raises and lists everything
that is wrong.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from vlmcore.errors import WeightError
from vlmcore.families.base import Config, Family, LanguageModel
from vlmcore.families.rows import (
    Drop,
    FuseGateUp,
    FuseQKV,
    Rename,
    Row,
    StackExperts,
    Subtree,
    Tied,
)
from vlmcore.weights.experts import ExpertsLayout, experts_layout
from vlmcore.weights.transforms import Array, Copy, InterleaveQKV, Transform, Transpose

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """A whole HF tensor, or its slice at one index of the first dimension (an expert)."""

    key: str
    index: int | None = None


@dataclass(frozen=True)
class Region:
    """Pieces of HF tensors ↔ one box of a global Megatron tensor.

    Attributes:
        mcore_key: The global tensor.
        global_shape: Its shape, stack dimensions (layer, expert) first.
        offset: Where the box begins.
        shape: Shape of the box; 1 in each stack dimension.
        sources: The pieces, in the order that the transform takes them.
        hf_shapes: Their shapes.
        transform: Pieces ↔ box.
    """

    mcore_key: str
    global_shape: Shape
    offset: Shape
    shape: Shape
    sources: tuple[Source, ...]
    hf_shapes: tuple[Shape, ...]
    transform: Transform

    @property
    def is_copy(self) -> bool:
        """Whether the box's bytes are those of its one piece."""
        return isinstance(self.transform, Copy)

    @property
    def is_transpose(self) -> bool:
        """Whether they are, once the box is stored with its last two dimensions swapped."""
        return isinstance(self.transform, Transpose)

    @property
    def label(self) -> str:
        """The box's name in journals and reports; slices of one HF tensor go by the name of the box
        that they make up together."""
        offset, shape = list(self.offset), list(self.shape)
        if self.sources[0].index is not None:
            sliced = len(shape) - len(self.hf_shapes[0]) - 1
            offset[sliced], shape[sliced] = 0, self.global_shape[sliced]
        return box_label(self.mcore_key, tuple(offset), tuple(shape))

    def pack(self, *pieces: Array) -> Array:
        """The box [shape] from its pieces."""
        return self.transform.to_mcore(*pieces).reshape(self.shape)

    def unpack(self, box: Array) -> tuple[Array, ...]:
        """The pieces from a box [shape]."""
        if self.is_copy:
            return (box.reshape(self.hf_shapes[0]),)
        rank = len(self.hf_shapes[0])
        return self.transform.to_hf(box.reshape(self.shape[len(self.shape) - rank :]))


def box_label(key: str, offset: Shape, shape: Shape) -> str:
    """A box of a global tensor by name: `key[0:1,0:20,0:48]`."""
    ranges = (f"{start}:{start + size}" for start, size in zip(offset, shape, strict=True))
    return f"{key}[{','.join(ranges)}]"


@dataclass(frozen=True)
class Unit:
    """Regions that share HF tensors: moved together, by one worker."""

    hf_keys: tuple[str, ...]
    regions: tuple[Region, ...]


@dataclass(frozen=True)
class Plan:
    """Regions of one checkpoint, and the HF tensors that have none, each with its reason."""

    regions: tuple[Region, ...]
    tied: Mapping[str, str] = field(default_factory=dict)  # repeated HF key → the key it repeats
    dropped: Mapping[str, str] = field(default_factory=dict)  # HF key → reason
    num_layers: int = 0
    mcore_prefix: str = ""

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """The regions by the HF tensors they share, in the plan's order."""
        groups: dict[tuple[str, ...], list[Region]] = defaultdict(list)
        for region in self.regions:
            groups[tuple(source.key for source in region.sources)].append(region)
        return tuple(Unit(keys, tuple(regions)) for keys, regions in groups.items())


@dataclass(frozen=True)
class _Stack:
    """Where a tensor stands in the stack: (index, size) of the layer and expert dimensions."""

    layer: int | None = None
    dims: tuple[tuple[int, int], ...] = ()


def build_plan(family: Family, config: Config, hf_shapes: Mapping[str, Shape]) -> Plan:
    """The plan that moves the tensors of `hf_shapes` between HF and Megatron-Core.

    Args:
        family: The family that the config names.
        config: HF config.
        hf_shapes: Every key of the HF checkpoint, in the form it was saved, with its shape.

    Raises:
        WeightError: Keys without a row, rows without a key, keys used twice, shapes that do not fit
            the config, layers missing from the stack; all of them in one message.
    """
    builder = _Builder(family.language_model(config), family, hf_shapes)
    for row in family.rows(config):
        builder.add(row)
    return builder.finish()


class _Builder:
    """Collects regions, and every fault on the way."""

    def __init__(
        self, model: LanguageModel, family: Family, hf_shapes: Mapping[str, Shape]
    ) -> None:
        self.model = model
        self.family = family
        self.faults: list[str] = []
        self.on_disk: dict[str, str] = {}  # key in memory → key in the checkpoint
        self.shapes: dict[str, Shape] = {}  # by key in memory
        for key in sorted(hf_shapes):
            memory = family.memory_key(key)
            if memory in self.on_disk:
                self.faults.append(f"{key}: the same tensor as {self.on_disk[memory]}")
            self.on_disk[memory] = key
            self.shapes[memory] = tuple(hf_shapes[key])
        self.layers = _layers(self.shapes)
        self.consumed: Counter[str] = Counter()
        self.regions: list[Region] = []
        self.tied: dict[str, str] = {}
        self.dropped: dict[str, str] = {}

    def add(self, row: Row) -> None:
        """Spells out one row."""
        tied = self.model.tied_embeddings
        match row:
            case Tied():
                for (key,), _ in self._found(row.hf) if tied else ():
                    self.tied[self.on_disk[key]] = self.on_disk.get(row.to, row.to)
            case Drop():
                for (key,), _ in self._found(row.hf):
                    self.dropped[self.on_disk[key]] = row.reason
            case Rename(hf="lm_head.weight") if tied:
                pass
            case Subtree():
                self._subtree(row)
            case StackExperts():
                self._experts(row)
            case Rename():
                for (key,), stack in self._required(row.hf):
                    self._place(row.mcore, (Source(key),), (self.shapes[key],), Copy(), stack)
            case FuseGateUp():
                for keys, stack in self._required(row.gate, row.up):
                    self._halves(row.mcore, [Source(key) for key in keys],
                                 [self.shapes[key] for key in keys], stack)  # fmt: skip
            case FuseQKV():
                for keys, stack in self._required(row.q, row.k, row.v):
                    self._qkv(row, keys, stack)

    def finish(self) -> Plan:
        """The plan, if there is nothing wrong with it."""
        for memory, key in self.on_disk.items():
            if not self.consumed[memory]:
                self.faults.append(f"{key}: no row maps it; add a row or Drop(reason=…)")
            elif self.consumed[memory] > 1:
                self.faults.append(f"{key}: {self.consumed[memory]} rows map it; expected one")
        self.faults += _tiling_faults(self.regions)
        if self.faults:
            raise WeightError(
                f"{self.family.model_type}: {len(self.faults)} fault(s) in the weight map of this "
                "checkpoint:\n  " + "\n  ".join(self.faults)
            )
        return Plan(
            regions=tuple(self.regions),
            tied=self.tied,
            dropped=self.dropped,
            num_layers=self.model.num_layers,
            mcore_prefix=self.family.mcore_prefix,
        )

    def _found(self, *patterns: str) -> Iterator[tuple[tuple[str, ...], _Stack]]:
        """Keys of each layer that match all patterns; partners that are missing go to `faults`."""
        stacks = [_Stack()]
        if "{layer}" in patterns[0]:
            stacks = [_Stack(i, ((i, self.model.num_layers),)) for i in self.layers]
        for stack in stacks:
            keys = tuple(p.replace("{layer}", str(stack.layer)) for p in patterns)
            present = [key for key in keys if key in self.shapes]
            self.consumed.update(present)
            if len(present) == len(keys):
                yield keys, stack
            elif present:
                lost = ", ".join(self._name(key) for key in keys if key not in present)
                there = ", ".join(self._name(key) for key in present)
                self.faults.append(f"{lost}: missing, though {there} is there")

    def _required(self, *patterns: str) -> Iterator[tuple[tuple[str, ...], _Stack]]:
        """As `_found`; a fault where the checkpoint has nothing that matches."""
        before = len(self.faults)
        found = list(self._found(*patterns))
        if not found and len(self.faults) == before:
            self.faults.append(f"{', '.join(patterns)}: the checkpoint has no such tensor")
        yield from found

    def _name(self, memory_key: str) -> str:
        """A key as the checkpoint writes it, or would."""
        return self.on_disk.get(memory_key, self.family.disk_key(memory_key))

    def _subtree(self, row: Subtree) -> None:
        below = [key for key in self.shapes if key.startswith(row.hf)]
        if not below:
            self.faults.append(f"{row.hf}*: the checkpoint has no such tensor")
        for key in below:
            self.consumed[key] += 1
            mcore_key = row.mcore + key.removeprefix(row.hf)
            self._place(mcore_key, (Source(key),), (self.shapes[key],), Copy(), _Stack())

    def _qkv(self, row: FuseQKV, keys: tuple[str, ...], stack: _Stack) -> None:
        model = self.model
        shapes = tuple(self.shapes[key] for key in keys)
        rest = shapes[0][1:]
        heads, groups = model.num_attention_heads, model.num_query_groups
        expected = tuple((n * model.kv_channels, *rest) for n in (heads, groups, groups))
        if shapes != expected:
            self.faults.append(
                f"{', '.join(self._name(key) for key in keys)}: shapes {shapes}, expected "
                f"{expected} for {heads} heads, {groups} kv heads, head dim {model.kv_channels}"
            )
            return
        transform = InterleaveQKV(groups, model.kv_channels)
        fused = (sum(shape[0] for shape in shapes), *rest)
        sources = tuple(Source(key) for key in keys)
        self._place(row.mcore, sources, shapes, transform, stack, box=fused)

    def _halves(
        self, mcore: str, sources: Sequence[Source], shapes: Sequence[Shape], stack: _Stack
    ) -> None:
        """Gate and up as the two halves of one tensor, no concatenation needed."""
        if shapes[0] != shapes[1]:
            gate, up = (self._name(source.key) for source in sources)
            self.faults.append(f"{gate}: shape {shapes[0]}, but {up} {shapes[1]}")
            return
        rows, *rest = shapes[0]
        for half, (source, shape) in enumerate(zip(sources, shapes, strict=True)):
            self._place(mcore, (source,), (shape,), Copy(), stack,
                        start=half * rows, whole=(2 * rows, *rest))  # fmt: skip

    def _experts(self, row: StackExperts) -> None:
        assert self.model.moe is not None
        for layer in self.layers:
            prefix = row.hf.replace("{layer}", str(layer))
            layout = experts_layout(
                prefix,
                {key: self.shapes[key] for key in self.shapes if key.startswith(prefix)},
                moe=self.model.moe,
                hidden_size=self.model.hidden_size,
                name=self._name,
            )
            self.consumed.update(layout.keys)
            self.faults += layout.faults
            if not layout.faults:
                self._layer_of_experts(row.mcore, layer, layout)

    def _layer_of_experts(self, mcore: str, layer: int, layout: ExpertsLayout) -> None:
        assert self.model.moe is not None
        count, size = self.model.moe.num_experts, self.model.moe.ffn_hidden_size
        hidden = self.model.hidden_size
        fc1, fc2 = f"{mcore}linear_fc1.weight", f"{mcore}linear_fc2.weight"
        for expert in range(count):
            stack = _Stack(layer, ((layer, self.model.num_layers), (expert, count)))
            if layout.per_expert:
                gate, up, down = (Source(key) for key in layout.keys[3 * expert : 3 * expert + 3])
                self._halves(fc1, (gate, up), ((size, hidden),) * 2, stack)
                self._place(fc2, (down,), ((hidden, size),), Copy(), stack)
                continue
            for mcore_key, key, box in (
                (fc1, layout.keys[0], (2 * size, hidden)),
                (fc2, layout.keys[1], (hidden, size)),
            ):
                transform = Transpose() if layout.input_first else Copy()
                piece = box[::-1] if layout.input_first else box
                self._place(mcore_key, (Source(key, expert),), (piece,), transform, stack, box=box)

    def _place(
        self,
        mcore_key: str,
        sources: tuple[Source, ...],
        shapes: tuple[Shape, ...],
        transform: Transform,
        stack: _Stack,
        *,
        box: Shape | None = None,
        start: int = 0,
        whole: Shape | None = None,
    ) -> None:
        """A region at row `start` of its tensor, below the stack dimensions where there are any."""
        box = shapes[0] if box is None else box
        whole = box if whole is None else whole
        mcore_key = mcore_key.replace("{layer}.", "")
        self.regions.append(
            Region(
                mcore_key=mcore_key,
                global_shape=(*(size for _, size in stack.dims), *whole),
                offset=(*(i for i, _ in stack.dims), *((start,) + (0,) * len(box))[: len(box)]),
                shape=(*(1 for _ in stack.dims), *box),
                sources=tuple(Source(self.on_disk[s.key], s.index) for s in sources),
                hf_shapes=shapes,
                transform=transform,
            )
        )


def _layers(shapes: Mapping[str, Shape]) -> list[int]:
    """The decoder's layers that the checkpoint has a tensor of."""
    pattern = re.compile(r"model\.(?:language_model\.)?layers\.(\d+)\.")
    return sorted({int(found[1]) for key in shapes if (found := pattern.match(key))})


def _tiling_faults(regions: list[Region]) -> list[str]:
    """Megatron tensors that the regions do not cover exactly once."""
    faults = []
    by_key: dict[str, list[Region]] = defaultdict(list)
    for region in regions:
        by_key[region.mcore_key].append(region)
    for key, parts in sorted(by_key.items()):
        if len({part.global_shape for part in parts}) != 1:
            shapes = sorted({part.global_shape for part in parts})
            faults.append(f"{key}: layers disagree on its shape: {shapes}")
            continue
        if len({part.offset for part in parts}) != len(parts):
            faults.append(f"{key}: written twice at one place")
        found = sum(math.prod(part.shape) for part in parts)
        expected = math.prod(parts[0].global_shape)
        if found != expected:
            layers = sorted({part.offset[0] for part in parts})
            faults.append(
                f"{key}: {found} of {expected} elements have a source (first indices {layers})"
            )
    return faults
