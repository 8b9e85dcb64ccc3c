"""A dataset's raw rows → finished shards, as its recipe says: checked, without repeats, split."""

import shutil
from collections.abc import Callable
from pathlib import Path

from data_prep.formats import RowFormat
from data_prep.progress import Progress, quiet
from data_prep.rows import Pick
from data_prep.samples import RowReader
from data_prep.shards import REPORT_NAME, ShardReport, write_shards
from data_prep.splits import Deal, deal
from data_prep.tables import find_tables
from vlmcore.errors import DataError
from vlmcore.recipe.schema import Dataset


def convert(
    raw_dir: Path,
    dest: Path,
    dataset: Dataset,
    *,
    work_dir: Path,
    tables: dict[str, list[Path]] | None = None,
    run: Callable | None = None,
    on_progress: Progress = quiet,
) -> ShardReport:
    """Write the shards of the fetched dataset in `raw_dir`.

    Args:
        dataset: its section of a recipe.
        work_dir: what a killed call finished is kept there, and removed at the end; also where
            the rows were refused, so that those that have been mended are read anew.
        tables: split → files of rows; None: those that `dataset` means.
        run: a `map` over other machines, instead of processes of this one.

    Raises:
        DataError: there are no rows, none is usable, or too many are not.
    """
    how = deal_of(dataset)
    limits = {
        "num_workers": dataset.num_workers,
        "max_samples_per_shard": dataset.max_samples_per_shard,
        "max_shard_bytes": dataset.max_shard_bytes,
    }

    def write(where: Path) -> ShardReport:
        try:
            return write_shards(
                raw_dir,
                where,
                max_bad_ratio=dataset.max_bad_ratio,
                reader=row_reader(raw_dir, dataset),
                tables=tables or find_tables(raw_dir, subset=dataset.subset, split=dataset.split),
                pick=Pick(dataset.limit, dataset.sample, dataset.sample_seed),
                work_dir=work_dir / "parts",
                run=run,
                on_progress=on_progress,
                **limits,
            )
        except DataError:
            shutil.rmtree(work_dir, ignore_errors=True)
            raise

    if how.split is None and how.duplicates == "keep":
        report = write(dest)
    else:
        whole = work_dir / "whole"
        if not (whole / REPORT_NAME).exists():  # else a killed call came as far as that
            write(whole)
        report = deal(whole, dest, how, **limits)
    shutil.rmtree(work_dir, ignore_errors=True)
    return report


def deal_of(dataset: Dataset) -> Deal:
    """How the samples of a recipe's dataset are dealt."""
    return Deal(
        split=dataset.split_ratios,
        split_by=dataset.split_by,
        duplicates=dataset.duplicates,
        seed=dataset.split_seed,
    )


def row_reader(raw_dir: Path, dataset: Dataset) -> RowReader:
    """How the rows of a recipe's dataset are read."""
    return RowReader(
        raw_dir,
        RowFormat(dataset.format, dict(dataset.columns), dataset.prompt),
        media_dir=dataset.media_dir,
        max_chars=dataset.max_chars,
        group_column=dataset.group_column,
    )
