"""HF safetensors ↔ Megatron-Core torch_dist, tensor by tensor, with a digest for every tensor."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vlmcore.errors import WeightError
from vlmcore.families import family_of, read_config
from vlmcore.weights.architecture import architecture_shapes, check_against_architecture
from vlmcore.weights.plan import Plan, Region, build_plan
from vlmcore.weights.safetensors_io import (
    SafetensorsFolder,
    parse_size,
    tensor_bytes,
    write_sharded,
)
from vlmcore.weights.torch_dist import Chunk, TorchDistReader, write_chunks

log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint"  # torch_dist folder inside a Megatron model folder
SIDECAR = "hf"  # config, tokenizer and processor files beside it
REPORT = "conversion.json"
# named one by one: a source may also hold reports and manifests, which tell of another artifact
SIDE_FILES = (
    "config.json", "generation_config.json", "*token*.json", "vocab*", "merges*", "*.model",
    "*processor*.json", "chat_template*", "*.jinja", "LICENSE*",
)  # fmt: skip
VOCABULARY = (
    "word_embeddings.weight",
    "output_layer.weight",
)  # first dimension, padded by Megatron


def to_mcore(
    source: Path, target: Path, *, dtype: torch.dtype | None = None, num_threads: int = 2
) -> dict[str, object]:
    """Converts an HF model folder; gives the report that is also written to `conversion.json`.

    Args:
        source: HF folder with config.json and safetensors.
        target: Gets `checkpoint/` (torch_dist), `hf/` (config, tokenizer, processor), the report.
        dtype: Dtype of the floating-point tensors; None keeps each as it is.
        num_threads: Writer threads.

    Raises:
        WeightError: The checkpoint differs from its architecture, or the weight map does not
            account for every tensor.
    """
    config = read_config(source)
    family = family_of(config)
    check_against_architecture(source)
    tensors = SafetensorsFolder(source)
    plan = build_plan(family, config, tensors.shapes)
    read: Counter[str] = Counter()
    digests: dict[str, str] = {}

    def chunk(region: Region) -> Chunk:
        kept = dtype or tensors[region.hf_keys[0]].dtype

        def make() -> Tensor:
            sources = []
            for key in region.hf_keys:
                tensor = tensors.read(key)
                read[key] += 1
                digests[key] = _digest(tensor)
                sources.append(tensor.to(kept))
            return region.to_mcore(*sources)

        return Chunk(region.mcore_key, region.global_shape, region.offset, region.shape, kept, make)

    write_chunks(
        target / CHECKPOINT, [chunk(region) for region in plan.regions], num_threads=num_threads
    )
    expected = {key for region in plan.regions for key in region.hf_keys}
    _check_ledger(read, expected, "read")
    copy_sidecar(source, target / SIDECAR)
    report: dict[str, object] = {
        "family": family.model_type,
        "keys_read": len(read) + len(plan.tied),
        "keys_written": len({region.mcore_key for region in plan.regions}),
        "tied": dict(plan.tied),
        "dropped": dict(plan.dropped),
        "digest": _total(digests),
        "tensors": dict(sorted(digests.items())),
    }
    (target / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    return report


def to_hf(
    source: Path, target: Path, *, dtype: torch.dtype | None = None, max_shard_size: str = "4GB"
) -> dict[str, object]:
    """Converts a Megatron model folder back; gives the report, also written to `conversion.json`.

    Args:
        source: Folder that `to_mcore` or a training stage wrote.
        target: Gets safetensors, index, config, tokenizer, processor and the report.
        dtype: Dtype of the floating-point tensors; None keeps each as it is stored.
        max_shard_size: Data of one safetensors file at most, such as 4GB.

    Raises:
        WeightError: A tensor of the architecture has no source in the checkpoint or the other way
            round, or shapes differ.
    """
    config = read_config(source / SIDECAR)
    family = family_of(config)
    shapes = architecture_shapes(source / SIDECAR)
    plan = build_plan(family, config, shapes)
    reader = TorchDistReader(source / CHECKPOINT)
    _check_stored(plan, reader)
    homes = {key: (region, i) for region in plan.regions for i, key in enumerate(region.hf_keys)}
    written: Counter[str] = Counter()
    digests: dict[str, str] = {}
    region_cache: dict[str, tuple[Tensor, ...]] = {}

    def kept(region: Region) -> torch.dtype:
        stored = reader.info(region.mcore_key)[1]
        return dtype if dtype and stored.is_floating_point else stored

    def read(key: str) -> Tensor:
        region, i = homes[key]
        name = region.hf_keys[0]
        if name not in region_cache:
            region_cache.clear()  # one region in memory
            box = reader.read(region.mcore_key, region.offset, region.shape)
            region_cache[name] = region.to_hf(_without_layer(box, region))
        tensor = region_cache[name][i].to(kept(region)).contiguous()
        written[key] += 1
        digests[key] = _digest(tensor)
        return tensor

    order = [key for region in plan.regions for key in region.hf_keys]
    tensors = {key: (tuple(shapes[key]), kept(homes[key][0])) for key in order}
    target.mkdir(parents=True, exist_ok=True)
    write_sharded(target, tensors, read, max_shard_bytes=parse_size(max_shard_size))
    _check_ledger(written, set(order), "written")
    copy_sidecar(source / SIDECAR, target)
    if dtype is not None:
        _record_dtype(target / "config.json", dtype)
    report: dict[str, object] = {
        "family": family.model_type,
        "keys_read": len({region.mcore_key for region in plan.regions}),
        "keys_written": len(written),
        "tied": dict(plan.tied),
        "dropped": dict(plan.dropped),
        "digest": _total(digests),
        "tensors": dict(sorted(digests.items())),
    }
    (target / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    return report


def copy_sidecar(source: Path, target: Path) -> None:
    """Copies what stands beside the weights: config, tokenizer, processor, templates."""
    target.mkdir(parents=True, exist_ok=True)
    for pattern in SIDE_FILES:
        for path in sorted(source.glob(pattern)):
            shutil.copyfile(path, target / path.name)


def _record_dtype(path: Path, dtype: torch.dtype) -> None:
    """Writes the dtype into a config, so that loaders and servers compute in it."""
    config = json.loads(path.read_text())
    name = str(dtype).removeprefix("torch.")
    for part in (config, config.get("text_config"), config.get("vision_config")):
        if isinstance(part, dict):
            for field in {"dtype", "torch_dtype"} & set(part) or {"dtype"}:
                part[field] = name
    path.write_text(json.dumps(config, indent=2) + "\n")


def _without_layer(box: Tensor, region: Region) -> Tensor:
    return box[0] if len(region.shape) > len(region.hf_shapes[0]) else box


def _check_stored(plan: Plan, reader: TorchDistReader) -> None:
    expected = {region.mcore_key: region.global_shape for region in plan.regions}
    prefixes = sorted({key.split(".", 1)[0] for key in expected})
    stored = set(reader.keys(below=[f"{prefix}." for prefix in prefixes]))
    faults = [f"{key}: missing from the checkpoint" for key in sorted(set(expected) - stored)]
    faults += [
        f"{key}: in the checkpoint, but no row maps it" for key in sorted(stored - {*expected})
    ]
    faults += [
        f"{key}: shape {reader.info(key)[0]}, expected {expected[key]}"
        for key in sorted(set(expected) & stored)
        if not _fits(key, reader.info(key)[0], expected[key])
    ]
    if faults:
        raise WeightError(f"{reader.folder}: {len(faults)} fault(s):\n  " + "\n  ".join(faults))


def _fits(key: str, stored: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Equal, or padded along the vocabulary, which is trimmed."""
    padded = key.endswith(VOCABULARY) and stored[0] > expected[0] and stored[1:] == expected[1:]
    return stored == expected or padded


def _check_ledger(counts: Mapping[str, int], expected: set[str], verb: str) -> None:
    faults = [f"{key}: {verb} {counts.get(key, 0)} times" for key in sorted(expected)
              if counts.get(key, 0) != 1]  # fmt: skip
    if faults:
        raise WeightError("the ledger does not close:\n  " + "\n  ".join(faults))


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def _total(digests: Mapping[str, str]) -> str:
    joined = "".join(f"{key}:{digest}\n" for key, digest in sorted(digests.items()))
    return hashlib.sha256(joined.encode()).hexdigest()
