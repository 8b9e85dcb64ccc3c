"""The savable training loader: energon datasets in, packed rows out, position restorable."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from megatron.energon import WorkerConfig, get_savable_loader, get_train_dataset
from megatron.energon.errors import reraise_exception
from megatron.energon.flavors.webdataset.empty_dataset_error import EmptyDatasetError
from megatron.energon.savable_loader import SavableDataLoader

from vlmcore.dataloading.cached_encoding import CachedEncoding
from vlmcore.dataloading.encode import ConversationEncoder
from vlmcore.dataloading.encoded_cache import EncodedCache
from vlmcore.dataloading.media import MediaLimits
from vlmcore.dataloading.samples import PackedRow
from vlmcore.dataloading.tar_samples import read_shards_directly
from vlmcore.dataloading.task_encoder import ConversationTaskEncoder
from vlmcore.errors import DataError
from vlmcore.recipe.train_stage import TrainStage

SHUFFLE_BUFFER_SIZE = 1_000
CHECKPOINT_EVERY_S = 10.0  # a restored worker makes the rows since its last one again
GC_EVERY_ROWS = 100  # not energon's 10: rows leave no cycles behind


def stage_task_encoder(
    stage: TrainStage, hf_dir: Path, *, cache_dir: Path | None = None
) -> ConversationTaskEncoder:
    """What makes rows of conversations for a training stage.

    Args:
        stage: Says how samples are encoded, cut and packed.
        hf_dir: Tokenizer, chat template and processor of the model.
        cache_dir: Where encoded samples are kept; None: nowhere.

    Raises:
        DataError: The model has no chat template, or its processor cannot keep a limit.
    """
    limits = {field.name: getattr(stage, field.name) for field in fields(MediaLimits)}
    encoder = ConversationEncoder(
        hf_dir, task=stage.task, limits=MediaLimits(**limits), loss_scale=stage.loss_scale
    )
    cached = None
    if cache_dir is not None:
        cached = CachedEncoding(
            EncodedCache(cache_dir),
            hf_dir=hf_dir,
            media=encoder.media,
            text_settings={"task": stage.task, "loss_scale": stage.loss_scale},
        )
    return row_maker(stage, encoder, cached)


def row_maker(
    stage: TrainStage, encoder: ConversationEncoder, cached: CachedEncoding | None
) -> ConversationTaskEncoder:
    """The same on an encoder that is there already, with counts of dropped samples of its own."""
    return ConversationTaskEncoder(
        encoder,
        max_length=stage.max_length,
        truncation=stage.truncation_strategy,
        multiple=stage.row_multiple,
        cached=cached,
    )


def stage_loader(
    stage: TrainStage,
    datasets: Mapping[Path, float],
    task_encoder: ConversationTaskEncoder,
    *,
    data_parallel_rank: int,
    data_parallel_size: int,
    blend_file: Path,
) -> SavableDataLoader[PackedRow]:
    """The rows that a training stage asks for; arguments as for `train_loader`."""
    return train_loader(
        datasets,
        task_encoder,
        micro_batch_size=stage.micro_batch_size,
        packing_buffer_size=stage.packing_buffer_size if stage.packing else None,
        seed=stage.seed,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
        blend_file=blend_file,
        num_workers=stage.dataloader_num_workers,
    )


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
    num_workers: int = 0,
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
        num_workers: Processes that read, encode and decode while the caller trains; each has the
            samples of its own shards and its own packing buffer. 0: the caller's process does it.

    Raises:
        DataError: There are fewer samples than processes that read them.
    """
    # the workers are the parallel ones, and a fork of a threaded tokenizer warns
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    worker_config = WorkerConfig(
        rank=data_parallel_rank,
        world_size=data_parallel_size,
        num_workers=num_workers,
        seed_offset=seed,
        global_error_handler=reraise_exception,  # a sample is dropped on purpose or not at all
    )
    try:
        dataset: Any = get_train_dataset(
            next(iter(datasets)) if len(datasets) == 1 else _blend(datasets, blend_file),
            worker_config=worker_config,
            batch_size=None if packing_buffer_size else micro_batch_size,
            packing_buffer_size=packing_buffer_size,
            shuffle_buffer_size=SHUFFLE_BUFFER_SIZE,
            max_samples_per_sequence=None,
            task_encoder=task_encoder,
        )
    except EmptyDatasetError as error:
        raise DataError(f"{_named(datasets)}: no sample is in the train split") from error
    if not all(dataset.len_worker(worker) for worker in range(max(1, num_workers))):
        readers = f"{data_parallel_size} data parallel ranks × {max(1, num_workers)}"
        raise DataError(
            f"{_named(datasets)}: fewer samples than processes that read them ({readers}); give it "
            f"more, or lower nproc_per_node or dataloader_num_workers"
        )
    read_shards_directly(dataset)
    return get_savable_loader(
        dataset,
        checkpoint_every_sec=CHECKPOINT_EVERY_S,
        gc_collect_every_n_steps=GC_EVERY_ROWS,
        watchdog_timeout_seconds=None,
    )


def stop_workers(loader: SavableDataLoader[PackedRow]) -> None:
    """Ends the processes of a loader, which is of no use afterwards.

    Left to the garbage collector each takes five seconds: a loader and its iterator refer to each
    other, and of what is collected in a cycle the queues are closed before the finalizer can tell
    the workers through them to end (torch 2.13, energon 7.4).
    """
    iterator = loader._iterator
    if iterator is not None:
        iterator._shutdown_workers()


def _named(datasets: Mapping[Path, float]) -> str:
    return ", ".join(map(str, datasets))


def _blend(datasets: Mapping[Path, float], blend_file: Path) -> Path:
    parts = [{"path": str(path.resolve()), "weight": weight} for path, weight in datasets.items()]
    blend = {
        "__module__": "megatron.energon",
        "__class__": "MetadatasetV2",
        "splits": {"train": {"blend": parts}},
    }
    blend_file.write_text(yaml.safe_dump(blend, sort_keys=False))
    return blend_file
