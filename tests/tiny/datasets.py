"""Energon datasets of few samples."""

from pathlib import Path

from data_prep.energon import prepare
from data_prep.shards import write_shards
from data_prep.sources import fetch


def numbers_dataset(folder: Path, *, train: int, val: int = 0) -> Path:
    """So many pictures of handwritten numbers, 20 a shard."""
    sizes = {"train": train, "val": val, "test": 4}
    fetch("builtin:handwritten_numbers", folder / "raw", options=sizes, seed=0)
    write_shards(
        folder / "raw",
        folder / "shards",
        max_bad_ratio=0.0,
        num_workers=1,
        max_samples_per_shard=20,
    )
    prepare(folder / "shards", folder / "energon")
    return folder / "energon"
