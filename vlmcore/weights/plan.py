"""The weight plan: a family's rows spelled out for one checkpoint, with the coverage ledger.

A plan is a list of regions. Each region pairs a few whole HF tensors with one box of one global
Megatron tensor, and holds the pure functions for both directions. Building the plan *is* the
proof of coverage: every HF key is consumed exactly once and every Megatron tensor is tiled exactly
once, or `build_plan` raises and lists everything that is wrong.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from vlmcore.errors import WeightError
from vlmcore.families.base import Config, Family, LanguageModel
from vlmcore.families.rows import Drop, FuseGateUp, FuseQKV, Rename, Row, Subtree, Tied, hf_patterns
from vlmcore.weights.transforms import fuse_qkv, split_qkv

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Region:
    """Whole HF tensors ↔ one box of a global Megatron tensor.

    `to_mcore` takes the HF tensors in the order of `hf_keys` and gives the box without its layer
    dimension; `to_hf` is its exact inverse.
    """

    mcore_key: str
    global_shape: Shape
    offset: Shape
    shape: Shape
    hf_keys: tuple[str, ...]
    hf_shapes: tuple[Shape, ...]
    to_mcore: Callable[..., Tensor]
    to_hf: Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Plan:
    """Regions of one checkpoint, and the HF tensors that have none, each with its reason."""

    regions: tuple[Region, ...]
    tied: Mapping[str, str] = field(default_factory=dict)  # repeated HF key → the key it repeats
    dropped: Mapping[str, str] = field(default_factory=dict)  # HF key → reason
    num_layers: int = 0
    mcore_prefix: str = ""


@dataclass(frozen=True)
class _Match:
    """HF keys of one row for one layer (None outside the stack)."""

    layer: int | None
    keys: tuple[str, ...]


def build_plan(family: Family, config: Config, hf_shapes: Mapping[str, Shape]) -> Plan:
    """The plan that moves the tensors of `hf_shapes` between HF and Megatron-Core.

    Args:
        family: The family that the config names.
        config: HF config.
        hf_shapes: Every key of the HF checkpoint with its shape.

    Raises:
        WeightError: Keys without a row, rows without a key, keys used twice, shapes that do not fit
            the config, layers missing from the stack; all of them in one message.
    """
    model = family.language_model(config)
    faults: list[str] = []
    consumed: dict[str, int] = defaultdict(int)
    regions: list[Region] = []
    tied: dict[str, str] = {}
    dropped: dict[str, str] = {}
    for row in family.rows:
        if isinstance(row, Tied) and not model.tied_embeddings:
            continue
        if isinstance(row, Rename) and row.hf == "lm_head.weight" and model.tied_embeddings:
            continue
        for match in _matches(row, hf_shapes, faults):
            for key in match.keys:
                consumed[key] += 1
            if isinstance(row, Tied):
                tied[match.keys[0]] = row.to
            elif isinstance(row, Drop):
                dropped[match.keys[0]] = row.reason
            else:
                regions += _regions(row, match, hf_shapes, model, faults)
    for key in sorted(hf_shapes):
        if consumed[key] != 1:
            faults.append(
                f"{key}: no row maps it; add a row or Drop(reason=…)"
                if not consumed[key]
                else f"{key}: {consumed[key]} rows map it; expected one"
            )
    faults += _tiling_faults(regions)
    if faults:
        raise WeightError(
            f"{family.model_type}: {len(faults)} fault(s) in the weight map of this checkpoint:\n  "
            + "\n  ".join(faults)
        )
    return Plan(
        regions=tuple(regions),
        tied=tied,
        dropped=dropped,
        num_layers=model.num_layers,
        mcore_prefix=family.mcore_prefix,
    )


def _matches(row: Row, hf_shapes: Mapping[str, Shape], faults: list[str]) -> Iterator[_Match]:
    """The groups of keys that a row consumes; partners that are missing go to `faults`."""
    if isinstance(row, Subtree):
        below = sorted(key for key in hf_shapes if key.startswith(row.hf))
        if not below:
            faults.append(f"{row.hf}*: the checkpoint has no such tensor")
        yield from (_Match(None, (key,)) for key in below)
        return
    patterns = hf_patterns(row)
    layers: set[int | None] = set()
    for pattern in patterns:
        regex = re.compile(re.escape(pattern).replace(r"\{layer\}", r"(?P<layer>\d+)") + r"\Z")
        for key in hf_shapes:
            if found := regex.match(key):
                layers.add(int(found["layer"]) if "{layer}" in pattern else None)
    if not layers and not isinstance(row, Tied | Drop):  # those two may find nothing
        faults.append(f"{', '.join(patterns)}: the checkpoint has no such tensor")
    for layer in sorted(layers, key=lambda i: -1 if i is None else i):
        keys = tuple(p if layer is None else p.replace("{layer}", str(layer)) for p in patterns)
        missing = [key for key in keys if key not in hf_shapes]
        if missing:
            present = sorted(set(keys) - set(missing))
            faults.append(f"{', '.join(missing)}: missing, though {', '.join(present)} is there")
        else:
            yield _Match(layer, keys)


def _regions(
    row: Rename | Subtree | FuseQKV | FuseGateUp,
    match: _Match,
    hf_shapes: Mapping[str, Shape],
    model: LanguageModel,
    faults: list[str],
) -> Iterator[Region]:
    shapes = tuple(tuple(hf_shapes[key]) for key in match.keys)
    match row:
        case Rename():
            yield _copy(row.mcore, match, 0, shapes[0], shapes[0], model)
        case Subtree():
            mcore_key = row.mcore + match.keys[0].removeprefix(row.hf)
            yield _copy(mcore_key, match, 0, shapes[0], shapes[0], model)
        case FuseGateUp():
            if shapes[0] != shapes[1]:
                faults.append(
                    f"{match.keys[0]}: shape {shapes[0]}, but {match.keys[1]} {shapes[1]}"
                )
                return
            rows = shapes[0][0]
            whole = (2 * rows, *shapes[0][1:])
            for half, key in enumerate(match.keys):
                one = _Match(match.layer, (key,))
                yield _copy(row.mcore, one, half * rows, shapes[half], whole, model)
        case FuseQKV():
            dim, groups = model.kv_channels, model.num_query_groups
            rest = shapes[0][1:]
            expected = (
                (model.num_attention_heads * dim, *rest),
                (groups * dim, *rest),
                (groups * dim, *rest),
            )
            if shapes != expected:
                faults.append(
                    f"{', '.join(match.keys)}: shapes {shapes}, expected {expected} for "
                    f"{model.num_attention_heads} heads, {groups} kv heads, head dim {dim}"
                )
                return
            fused = (sum(s[0] for s in shapes), *rest)
            geometry = {"num_query_groups": groups, "kv_channels": dim}
            yield _place(
                row.mcore,
                match,
                0,
                fused,
                fused,
                shapes,
                model,
                to_mcore=lambda q, k, v: fuse_qkv(q, k, v, **geometry),
                to_hf=lambda qkv: split_qkv(qkv, **geometry),
            )


def _copy(
    mcore_key: str, match: _Match, start: int, shape: Shape, whole: Shape, model: LanguageModel
) -> Region:
    return _place(
        mcore_key, match, start, shape, whole, (shape,), model,
        to_mcore=lambda tensor: tensor, to_hf=lambda tensor: (tensor,),
    )  # fmt: skip


def _place(
    mcore_key: str,
    match: _Match,
    start: int,
    shape: Shape,
    whole: Shape,
    hf_shapes: tuple[Shape, ...],
    model: LanguageModel,
    *,
    to_mcore: Callable[..., Tensor],
    to_hf: Callable[[Tensor], tuple[Tensor, ...]],
) -> Region:
    """A region at row `start` of its tensor, below the layer dimension where there is one."""
    offset = (start, *(0 for _ in shape[1:])) if shape else ()
    if match.layer is not None:
        offset, shape, whole = (match.layer, *offset), (1, *shape), (model.num_layers, *whole)
    return Region(mcore_key, whole, offset, shape, match.keys, hf_shapes, to_mcore, to_hf)


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
