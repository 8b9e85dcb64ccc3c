"""Raw rows → webdataset tar shards that hold the original bytes of all media, split by split.

A sample is the members `KEY.json` (`{"messages": […], "images": ["0.png", …]}`, the images' member
names in the order of their tags; `videos`, `audios`, `rejected_messages` where there are any) and
`KEY.0.png`, `KEY.1.jpg`, `KEY.v0.mp4` …: webdataset and energon take what stands before the first
dot as the sample's key and the rest as the member's name.

Each range of rows is checked and written by one process in one pass, and what it writes depends on
nothing but those rows: any number of workers gives the same bytes.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from data_prep.causes import Dropped
from data_prep.files import link_or_copy
from data_prep.formats import RowFormat
from data_prep.parts import Part, write_range
from data_prep.progress import Progress, quiet
from data_prep.rows import Pick, split_ranges
from data_prep.samples import RowReader
from data_prep.tables import find_tables
from data_prep.workers import mapper
from vlmcore.errors import DataError

log = logging.getLogger(__name__)

REPORT_NAME = "report.json"
MAX_SAMPLES_PER_SHARD = 10_000  # what LLaVA-Pretrain's shards hold in NVIDIA's guides
MAX_SHARD_BYTES = 4 * 1024**3


@dataclass
class ShardReport:
    """What was written and what was left out, as in `report.json`."""

    num_rows: int = 0
    samples: dict[str, int] = field(default_factory=dict)  # split → number
    num_images: int = 0
    num_videos: int = 0
    num_audios: int = 0
    shards: dict[str, list[str]] = field(default_factory=dict)  # split → file names, in order
    dropped: dict[str, int] = field(default_factory=dict)  # cause → number of rows
    examples: dict[str, list[str]] = field(default_factory=dict)  # cause → `file:line what`


def write_shards(
    raw_dir: Path,
    dest: Path,
    *,
    max_bad_ratio: float,
    num_workers: int,
    reader: RowReader | None = None,
    tables: dict[str, list[Path]] | None = None,
    pick: Pick | None = None,
    max_samples_per_shard: int = MAX_SAMPLES_PER_SHARD,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    work_dir: Path | None = None,
    run: Callable | None = None,
    on_progress: Progress = quiet,
) -> ShardReport:
    """Write `{split}-000000.tar` … for each split of `raw_dir`, and `report.json`.

    Args:
        max_bad_ratio: the share of rows that may be unusable; each is left out and counted.
        num_workers: processes, each at one shard; 1 works in this process.
        reader: how rows are read; None: the `messages` format, media beside the tables.
        tables: split → files of rows; None: those that `raw_dir` holds.
        pick: which rows of each split are read; None: all.
        max_shard_bytes: a shard is closed before it would grow past this; a single larger sample
            gets a shard of its own.
        work_dir: where a killed call left its finished parts, which are kept; None: none are.
        run: a `map` over other machines, instead of processes of this one.

    Raises:
        DataError: no split, a split without a usable sample, or too many bad rows.
    """
    reader = reader or RowReader(raw_dir, RowFormat())
    tables = tables or find_tables(raw_dir)
    dest.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=dest, prefix=".parts-") as own,
        mapper(num_workers) as here,
    ):
        parts_dir = work_dir or Path(own)
        parts_dir.mkdir(parents=True, exist_ok=True)
        ranges = {
            split: split_ranges(split, files, max_rows=max_samples_per_shard, pick=pick or Pick())
            for split, files in tables.items()
        }
        total = sum(one.num_wanted for many in ranges.values() for one in many)
        write = partial(write_range, dest=parts_dir, reader=reader, max_shard_bytes=max_shard_bytes)
        written: dict[str, list[Part]] = {split: [] for split in tables}
        done = 0
        for split, many in ranges.items():
            for parts in (run or here)(write, many):
                written[split] += parts
                done += sum(part.dropped.num_rows for part in parts)
                on_progress(done, total, "rows")
        report = _report(raw_dir, written, max_bad_ratio=max_bad_ratio)
        for split, parts in written.items():
            names = report.shards[split]
            for part, name in zip(_tars(parts), names, strict=True):
                link_or_copy(parts_dir / f"{part.name}.tar", dest / name)
    write_report(report, dest)
    if work_dir is not None:
        shutil.rmtree(work_dir)
    return report


def read_report(shards_dir: Path) -> ShardReport:
    """The report that lies beside shards.

    Raises:
        DataError: there is none, so the folder holds no finished shards.
    """
    try:
        return ShardReport(**json.loads((shards_dir / REPORT_NAME).read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise DataError(
            f"{shards_dir} has no {REPORT_NAME}: its shards were not written to the end. "
            "Write them again."
        ) from error
    except (ValueError, TypeError) as error:
        raise DataError(f"{shards_dir / REPORT_NAME} is no report of shards: {error}.") from error


def write_report(report: ShardReport, dest: Path) -> None:
    """Put the report beside the shards: its being there means that they are whole."""
    text = json.dumps(asdict(report), indent=2, ensure_ascii=False)
    (dest / REPORT_NAME).write_text(text + "\n", encoding="utf-8")


def shard_name(split: str, number: int) -> str:
    """Name of a split's shard; energon tells splits apart by it."""
    return f"{split}-{number:06d}.tar"


def _tars(parts: list[Part]) -> list[Part]:
    return [part for part in parts if part.num_samples]


def _report(raw_dir: Path, written: dict[str, list[Part]], *, max_bad_ratio: float) -> ShardReport:
    dropped, report = Dropped(), ShardReport()
    for split, parts in written.items():
        here = Dropped()
        for part in parts:
            here.merge(part.dropped)
        if not _tars(parts):
            raise DataError(
                f"{raw_dir}: split {split} has no usable sample. Mend it or remove it.\n"
                + here.describe()
            )
        dropped.merge(here)
        report.samples[split] = sum(part.num_samples for part in parts)
        report.shards[split] = [shard_name(split, n) for n in range(len(_tars(parts)))]
        report.num_images += sum(part.num_media.get("images", 0) for part in parts)
        report.num_videos += sum(part.num_media.get("videos", 0) for part in parts)
        report.num_audios += sum(part.num_media.get("audios", 0) for part in parts)
    check_tolerance(str(raw_dir), dropped, max_bad_ratio=max_bad_ratio)
    report.num_rows = dropped.num_rows
    report.dropped = dict(sorted(dropped.counts.items()))
    report.examples = dict(sorted(dropped.examples.items()))
    return report


def check_tolerance(where: str, dropped: Dropped, *, max_bad_ratio: float) -> None:
    """Accept so many bad rows, with a warning.

    Raises:
        DataError: there are more; the worst causes come first.
    """
    num_bad = dropped.counts.total()
    if num_bad:
        log.warning("%s: %d of %d rows left out", where, num_bad, dropped.num_rows)
    if dropped.ratio > max_bad_ratio:
        raise DataError(
            f"{where}: {num_bad} of {dropped.num_rows} rows ({dropped.ratio:.1%}) are unusable, "
            f"max_bad_ratio allows {max_bad_ratio:.1%}. Mend the rows or raise max_bad_ratio.\n"
            + dropped.describe()
        )
