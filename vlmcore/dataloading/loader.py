"""The savable training loader: energon datasets in, packed rows out, position restorable."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from megatron.energon import WorkerConfig, get_savable_loader, get_train_dataset
from megatron.energon.errors import reraise_exception
from megatron.energon.savable_loader import SavableDataLoader

from vlmcore.dataloading.samples import PackedRow
from vlmcore.dataloading.task_encoder import ConversationTaskEncoder

SHUFFLE_BUFFER_SIZE = 1_000


def train_loader(
    datasets: Mapping[Path, float],
    task_encoder: ConversationTaskEncoder,
    *,
    micro_batch_size: int,
    packing_buffer_size: int | None,
    seed: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    blend_file: Path,
) -> SavableDataLoader[PackedRow]:
    """An endless loader of this data parallel rank's rows.

    Args:
        datasets: Energon dataset folder → its weight: of several, each is drawn from in
            proportion to it, however many samples it has.
        task_encoder: Encodes and packs.
        micro_batch_size: Samples of a row without packing.
        packing_buffer_size: Samples the packer looks at together; None: no packing.
        seed: Decides the order.
        data_parallel_rank: Ranks of one tensor parallel group pass the same one.
        data_parallel_size: How many ranks read different data.
        blend_file: Where the description of a blend is written.
    """
    worker_config = WorkerConfig(
        rank=data_parallel_rank,
        world_size=data_parallel_size,
        num_workers=0,
        seed_offset=seed,
        global_error_handler=reraise_exception,  # a sample is dropped on purpose or not at all
    )
    dataset: Any = get_train_dataset(
        next(iter(datasets)) if len(datasets) == 1 else _blend(datasets, blend_file),
        worker_config=worker_config,
        batch_size=None if packing_buffer_size else micro_batch_size,
        packing_buffer_size=packing_buffer_size,
        shuffle_buffer_size=SHUFFLE_BUFFER_SIZE,
        max_samples_per_sequence=None,
        task_encoder=task_encoder,
    )
    return get_savable_loader(dataset, watchdog_timeout_seconds=None)


def _blend(datasets: Mapping[Path, float], blend_file: Path) -> Path:
    parts = [{"path": str(path.resolve()), "weight": weight} for path, weight in datasets.items()]
    blend = {
        "__module__": "megatron.energon",
        "__class__": "MetadatasetV2",
        "splits": {"train": {"blend": parts}},
    }
    blend_file.write_text(yaml.safe_dump(blend, sort_keys=False))
    return blend_file
