"""Rows of a held-out split, in the same order every time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron.energon import WorkerConfig, get_loader, get_val_dataset
from megatron.energon.errors import reraise_exception

from vlmcore.dataloading.samples import PackedRow
from vlmcore.dataloading.task_encoder import ConversationTaskEncoder
from vlmcore.recipe.train_stage import TrainStage


def held_out_rows(
    stage: TrainStage,
    datasets: Sequence[Path],
    task_encoder: ConversationTaskEncoder,
    *,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> Iterator[PackedRow]:
    """This data parallel rank's rows of the datasets' held-out split, each sample once.

    Args:
        stage: Names the split, and says how rows are made.
        datasets: Energon dataset folders, read one after the other.
        task_encoder: Encodes and packs; not the one of a loader in this process, whose counts of
            dropped samples it would add to.
        data_parallel_rank: Ranks of one tensor parallel group pass the same one.
        data_parallel_size: How many ranks read different data.
    """
    for folder in datasets:
        dataset: Any = get_val_dataset(
            folder,
            split_part=stage.eval_split,
            worker_config=WorkerConfig(
                rank=data_parallel_rank,
                world_size=data_parallel_size,
                num_workers=0,
                seed_offset=stage.seed,
                global_error_handler=reraise_exception,
            ),
            batch_size=None if stage.packing else stage.micro_batch_size,
            packing_buffer_size=stage.packing_buffer_size if stage.packing else None,
            task_encoder=task_encoder,
        )
        yield from get_loader(dataset)
