"""Where tensors stand in the safetensors shards of an HF model folder, before one is written."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vlmcore.weights.dtypes import CODES, itemsize

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """A safetensors file to be: its header, and where each tensor's bytes go."""

    name: str
    header: bytes
    starts: Mapping[str, int]  # key → first byte in the file
    size_bytes: int


def plan_shards(tensors: Mapping[str, tuple[Shape, str]], *, max_shard_bytes: int) -> list[Shard]:
    """The shards of some tensors, in their order.

    Args:
        tensors: Key → (shape, torch name of the dtype).
        max_shard_bytes: A shard's data at most; a larger tensor gets a shard of its own.
    """
    groups = list(_group(tensors, max_shard_bytes))
    count = len(groups)
    names = (
        ["model.safetensors"]
        if count == 1
        else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    )
    return [
        _shard(name, {key: tensors[key] for key in keys})
        for name, keys in zip(names, groups, strict=True)
    ]


def shard_index(shards: Sequence[Shard]) -> str | None:
    """Text of the index file; None where there is one shard only."""
    if len(shards) == 1:
        return None
    placed = {key: shard.name for shard in shards for key in shard.starts}
    total = sum(shard.size_bytes - len(shard.header) for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    return json.dumps(index, indent=2) + "\n"


def _group(tensors: Mapping[str, tuple[Shape, str]], limit: int) -> Iterable[list[str]]:
    shard: list[str] = []
    size = 0
    for key, (shape, dtype) in tensors.items():
        num_bytes = math.prod(shape) * itemsize(dtype)
        if shard and size + num_bytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(key)
        size += num_bytes
    yield shard


def _shard(name: str, tensors: Mapping[str, tuple[Shape, str]]) -> Shard:
    """8 bytes of header length, the JSON header, the data (safetensors format 1)."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, position = {}, 0
    for key, (shape, dtype) in tensors.items():
        begins[key], position = position, position + math.prod(shape) * itemsize(dtype)
        offsets = [begins[key], position]
        header[key] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": offsets}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # data starts aligned, as the format asks
    whole = struct.pack("<Q", len(encoded)) + encoded
    starts = {key: len(whole) + begin for key, begin in begins.items()}
    return Shard(name, whole, starts, len(whole) + position)
