"""HF safetensors ↔ Megatron-Core torch_dist, tensor by tensor, with a digest for every tensor.

No model is built for it: a weight plan says which bytes go where, workers move them, a journal lets
an interrupted conversion continue, and a ledger says that nothing was lost. See `units`, `workers`,
`journal`, `report`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vlmcore.errors import WeightError
from vlmcore.families import Config, Family, family_of, read_config
from vlmcore.weights.architecture import check_against_architecture, published_shapes
from vlmcore.weights.boxes import VOCABULARY
from vlmcore.weights.dtypes import FLOATS
from vlmcore.weights.layout import Box, Place, place_boxes, write_metadata
from vlmcore.weights.plan import Plan, Region, build_plan
from vlmcore.weights.report import close_ledger, conversion_report
from vlmcore.weights.safetensors_io import INDEX, SafetensorsFolder, TensorInfo, parse_size
from vlmcore.weights.shards import Shard, plan_shards, shard_index
from vlmcore.weights.sidecar import (
    SIDECAR,
    copy_sidecar,
    leave_quantization_out,
    record_dtype,
)
from vlmcore.weights.torch_dist import GlobalTensor, read_checkpoint
from vlmcore.weights.units import PackUnit, Task, UnpackUnit
from vlmcore.weights.workers import Listener, move_units
from vlmcore.weights.workfolder import WorkFolder, require_free, work_folder

CHECKPOINT = "checkpoint"  # torch_dist folder inside a Megatron model folder
REPORT = "conversion.json"

Shape = tuple[int, ...]


def to_mcore(
    source: Path,
    target: Path,
    *,
    dtype: str | None = None,
    num_processes: int | None = None,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """Converts an HF model folder; gives the report that is also written to `conversion.json`.

    What it has written of an interrupted conversion stays in `TARGET.partial`, and the next call
    with the same source and dtype continues there.

    Args:
        source: HF folder with config.json and safetensors.
        target: Gets `checkpoint/` (torch_dist), `hf/` (config, tokenizer, processor), the report;
            must not be there yet, or be empty.
        dtype: Torch name of the dtype of all tensors; None keeps each as it is.
        num_processes: Workers; None: one a core, 8 at most, fewer where there is little to do.
        on_progress: Hears (bytes done, bytes in all).

    Returns:
        The report, with `seconds` and the number of units that were `resumed`.

    Raises:
        WeightError: The checkpoint differs from its architecture, the weight map does not account
            for every tensor, a file is damaged, the disk is full, or a worker died.
    """
    began = time.perf_counter()
    require_free(target)
    config = read_config(source)
    family = family_of(config)
    tensors = SafetensorsFolder(source)
    plan = _plan(family, config, tensors)
    boxes = _boxes(plan, tensors, dtype)
    placed = dict(zip(boxes, place_boxes(list(boxes.values())), strict=True))
    tasks = [
        PackUnit(
            number,
            unit,
            {key: tensors[key] for key in unit.hf_keys},
            tuple(boxes[region] for region in unit.regions),
            tuple(placed[region] for region in unit.regions),
        )
        for number, unit in enumerate(plan.units)
    ]
    identity = {
        "direction": "to_mcore",
        "source": _identity(source, [*tensors.files, source / "config.json"]),
        "dtype": dtype,
    }
    files = {f"{CHECKPOINT}/{name}": size for name, size in _sizes(placed.values()).items()}
    with work_folder(target, identity=identity, files=files) as work:
        copy_sidecar(source, work.path / SIDECAR)
        leave_quantization_out(work.path / SIDECAR / "config.json")
        resumed = _move(
            work, CHECKPOINT, tasks, partial(check_against_architecture, source),
            num_processes=num_processes, on_progress=on_progress,
        )  # fmt: skip
        write_metadata(work.path / CHECKPOINT, {boxes[r]: placed[r] for r in plan.regions})
        scales = {key: info.scale.key for key, info in tensors.items() if info.scale}
        report = _report(
            work, family, plan,
            keys_read=len(tensors) - len(plan.dropped),
            keys_written=len({region.mcore_key for region in plan.regions}),
            dequantized=scales,
        )  # fmt: skip
        work.publish()
    return report | {"seconds": round(time.perf_counter() - began, 3), "resumed": resumed}


def to_hf(
    source: Path,
    target: Path,
    *,
    dtype: str | None = None,
    max_shard_size: str = "4GB",
    num_processes: int | None = None,
    on_progress: Listener | None = None,
) -> dict[str, Any]:
    """Converts a Megatron model folder back; gives the report, also written to `conversion.json`.

    Continues an interrupted conversion as `to_mcore` does.

    Args:
        source: Folder that `to_mcore` or a training stage wrote, at whatever parallel layout.
        target: Gets safetensors, index, config, tokenizer, processor and the report; must not be
            there yet, or be empty.
        dtype: Torch name of the dtype of all tensors; None keeps each as it is stored.
        max_shard_size: Data of one safetensors file at most, such as 4GB.
        num_processes: Workers; None: one a core, 8 at most, fewer where there is little to do.
        on_progress: Hears (bytes done, bytes in all).

    Returns:
        The report, with `seconds` and the number of units that were `resumed`.

    Raises:
        WeightError: A tensor of the architecture has no source in the checkpoint or the other way
            round, shapes differ, a file is damaged, the disk is full, or a worker died.
    """
    began = time.perf_counter()
    require_free(target)
    limit = parse_size(max_shard_size)
    config = read_config(source / SIDECAR)
    family = family_of(config)
    stored = read_checkpoint(source / CHECKPOINT)
    shapes = published_shapes(source / SIDECAR)
    plan = build_plan(family, config, shapes)
    _check_stored(source / CHECKPOINT, plan, stored)
    kept = {
        key: dtype or stored[region.mcore_key].dtype
        for region in plan.regions
        for key in (piece.key for piece in region.sources)
    }
    order = {key: (shape, kept[key]) for key, shape in shapes.items() if key in kept}
    shards = plan_shards(order, max_shard_bytes=limit)
    written = _places(shards, order)
    tasks = [
        UnpackUnit(
            number,
            unit,
            tuple(stored[r.mcore_key].within(r.offset, r.shape) for r in unit.regions),
            {key: written[key] for key in unit.hf_keys},
        )
        for number, unit in enumerate(plan.units)
    ]
    identity = {
        "direction": "to_hf",
        "source": _identity(source, [*sorted((source / CHECKPOINT).iterdir()),
                                     source / SIDECAR / "config.json"]),
        "dtype": dtype,
        "max_shard_bytes": limit,
    }  # fmt: skip
    files = {shard.name: shard.size_bytes for shard in shards}
    with work_folder(target, identity=identity, files=files) as work:
        resumed = _move(
            work, ".", tasks, lambda: None, num_processes=num_processes, on_progress=on_progress
        )
        _write_headers(work.path, shards)
        copy_sidecar(source / SIDECAR, work.path)
        if dtype is not None:
            record_dtype(work.path / "config.json", dtype)
        report = _report(
            work, family, plan,
            keys_read=len({region.mcore_key for region in plan.regions}),
            keys_written=len(order),
            dequantized={},
        )  # fmt: skip
        work.publish()
    return report | {"seconds": round(time.perf_counter() - began, 3), "resumed": resumed}


def _plan(family: Family, config: Config, tensors: SafetensorsFolder) -> Plan:
    """The plan; where it does not close, the architecture says best what the checkpoint lacks."""
    try:
        return build_plan(family, config, tensors.shapes)
    except WeightError:
        check_against_architecture(tensors.folder)
        raise


def _boxes(plan: Plan, tensors: SafetensorsFolder, dtype: str | None) -> dict[Region, Box]:
    """The box of each region, with its dtype.

    Raises:
        WeightError: Lists weights that are no floating-point numbers, and global tensors whose
            parts have several dtypes.
    """
    kinds: dict[str, dict[str, str]] = {}  # mcore key → dtype → an HF key that has it
    for region in plan.regions:
        for piece in region.sources:
            found = tensors[piece.key].dtype_name
            kinds.setdefault(region.mcore_key, {}).setdefault(found, piece.key)
    faults = [
        f"{key}: dtype {kind}, expected one of {', '.join(FLOATS)}"
        for found in kinds.values()
        for kind, key in found.items()
        if kind not in FLOATS
    ]
    faults += [
        f"{mcore_key}: "
        + ", ".join(f"{key} is {kind}" for kind, key in sorted(found.items()))
        + "; expected one dtype, choose it with --dtype"
        for mcore_key, found in sorted(kinds.items())
        if len(found) > 1 and dtype is None
    ]
    if faults:
        raise WeightError(f"{tensors.folder}: {len(faults)} fault(s):\n  " + "\n  ".join(faults))
    return {
        region: Box(
            region.mcore_key, region.global_shape, region.offset, region.shape,
            dtype or tensors[region.sources[0].key].dtype_name, swapped=region.is_transpose,
        )
        for region in plan.regions
    }  # fmt: skip


def _move(
    work: WorkFolder,
    folder: str,
    tasks: Sequence[Task],
    check: Callable[[], None],
    *,
    num_processes: int | None,
    on_progress: Listener | None,
) -> int:
    """Moves all units and closes the ledger; how many units an earlier conversion had done."""
    resumed = len(work.journal.progress.done)
    judged: list[WeightError] = []

    def judge() -> None:
        try:
            check()
        except WeightError as error:
            judged.append(error)
            raise

    try:
        with work.syncing():
            move_units(
                work.path / folder, tasks, journal=work.journal, num_processes=num_processes,
                check=judge, on_progress=on_progress,
            )  # fmt: skip
    except WeightError:
        if judged:  # a source that must not be converted is not gone on with
            work.discard()
        raise
    close_ledger(tasks, work.journal.progress)
    return resumed


def _report(
    work: WorkFolder,
    family: Family,
    plan: Plan,
    *,
    keys_read: int,
    keys_written: int,
    dequantized: Mapping[str, str],
) -> dict[str, Any]:
    done = [one for _, one in sorted(work.journal.progress.done.items())]
    counts = {"keys_read": keys_read, "keys_written": keys_written}
    report = counts | conversion_report(family.model_type, plan, done, dequantized=dequantized)
    (work.path / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    return report


def _identity(folder: Path, files: list[Path]) -> dict[str, object]:
    """What a source is: any file of it that changes makes it another one."""
    config = next(path for path in files if path.name == "config.json")
    return {
        "config": hashlib.sha256(config.read_bytes()).hexdigest(),
        "files": [
            [path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns]
            for path in files
        ],
    }


def _sizes(places: Iterable[Place]) -> dict[str, int]:
    """File → its size."""
    sizes: dict[str, int] = {}
    for place in places:
        sizes[place.file] = max(sizes.get(place.file, 0), place.start + place.length)
    return sizes


def _places(shards: list[Shard], tensors: Mapping[str, tuple[Shape, str]]) -> dict[str, TensorInfo]:
    """Where each HF tensor is written."""
    return {
        key: TensorInfo(*tensors[key], Path(shard.name), start)
        for shard in shards
        for key, start in shard.starts.items()
    }


def _write_headers(folder: Path, shards: list[Shard]) -> None:
    """Headers and the index; the data is there already."""
    for shard in shards:
        with (folder / shard.name).open("r+b") as file:
            file.write(shard.header)
    if (index := shard_index(shards)) is not None:
        (folder / INDEX).write_text(index)


def _check_stored(folder: Path, plan: Plan, stored: Mapping[str, GlobalTensor]) -> None:
    expected = {region.mcore_key: region.global_shape for region in plan.regions}
    prefixes = tuple(f"{key.split('.', 1)[0]}." for key in expected)
    found = {key for key in stored if key.startswith(prefixes)}  # no optimizer state
    faults = [f"{key}: missing from the checkpoint" for key in sorted(set(expected) - found)]
    faults += [
        f"{key}: in the checkpoint, but no row maps it" for key in sorted(found - {*expected})
    ]
    faults += [
        f"{key}: shape {stored[key].shape}, expected {expected[key]}"
        for key in sorted(set(expected) & found)
        if not _fits(key, stored[key].shape, expected[key])
    ]
    faults += [
        f"{key}: dtype {stored[key].dtype}, expected one of {', '.join(FLOATS)}"
        for key in sorted(set(expected) & found)
        if stored[key].dtype not in FLOATS
    ]
    if faults:
        raise WeightError(f"{folder}: {len(faults)} fault(s):\n  " + "\n  ".join(faults))


def _fits(key: str, stored: Shape, expected: Shape) -> bool:
    """Equal, or padded along the vocabulary, which is trimmed."""
    padded = key.endswith(VOCABULARY) and stored[0] > expected[0] and stored[1:] == expected[1:]
    return stored == expected or padded
