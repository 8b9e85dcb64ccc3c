"""Raw rows → webdataset tar shards that hold the original image bytes, split by split.

A sample is the members `KEY.json` (`{"messages": […], "images": ["0.png", …]}`, the images' member
names in the order of their tags) and `KEY.0.png`, `KEY.1.jpg` …: webdataset and energon take what
stands before the first dot as the sample's key and the rest as the member's name.

Each range of rows is checked and written by one process in one pass, and what it writes depends on
nothing but those rows: any number of workers gives the same bytes.
"""

import io
import json
import logging
import os
import tarfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from operator import itemgetter
from pathlib import Path

from data_prep import SPLITS
from data_prep.formats import find_format
from data_prep.samples import Dropped, RawSample, RowRange, read_samples, row_ranges
from vlmcore.errors import DataError

log = logging.getLogger(__name__)

REPORT_NAME = "report.json"
MAX_SAMPLES_PER_SHARD = 10_000  # what LLaVA-Pretrain's shards hold in NVIDIA's guides
MAX_SHARD_BYTES = 4 * 1024**3

Member = tuple[str, bytes]  # name in the tar, content


@dataclass
class Shard:
    """One written tar file."""

    path: Path
    num_samples: int = 0
    num_images: int = 0


@dataclass
class ShardReport:
    """What was written and what was left out, as in `report.json`."""

    num_rows: int = 0
    samples: dict[str, int] = field(default_factory=dict)  # split → number
    num_images: int = 0
    shards: dict[str, list[str]] = field(default_factory=dict)  # split → file names, in order
    dropped: dict[str, int] = field(default_factory=dict)  # cause → number of rows
    examples: dict[str, list[str]] = field(default_factory=dict)  # cause → `file:line what`


def write_shards(
    raw_dir: Path,
    dest: Path,
    *,
    max_bad_ratio: float,
    num_workers: int,
    data_format: str = "messages",
    max_samples_per_shard: int = MAX_SAMPLES_PER_SHARD,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ShardReport:
    """Write `{split}-000000.tar` … for each `{split}.jsonl` of `raw_dir`, and `report.json`.

    Args:
        max_bad_ratio: the share of rows that may be unusable; each is left out and counted.
        num_workers: processes, each at one shard; 1 works in this process.
        max_shard_bytes: a shard is closed before it would grow past this; a single larger sample
            gets a shard of its own.

    Raises:
        DataError: no split, a split without a usable sample, or too many bad rows.
    """
    find_format(data_format)
    dest.mkdir(parents=True, exist_ok=True)
    report, dropped = ShardReport(), Dropped()
    write = partial(
        _write_range, dest=dest, data_format=data_format, max_shard_bytes=max_shard_bytes
    )
    with _mapper(num_workers) as run:
        for split in _splits(raw_dir):
            ranges = row_ranges(raw_dir / f"{split}.jsonl", max_rows=max_samples_per_shard)
            shards: list[Shard] = []
            for written, dropped_here in run(write, ranges):
                shards += written
                dropped.merge(dropped_here)
            if not shards:
                raise DataError(
                    f"{raw_dir}: {split}.jsonl has no usable sample. Mend it or remove it.\n"
                    + dropped.describe()
                )
            _publish(shards, split=split, report=report)
    _check_tolerance(raw_dir, dropped, max_bad_ratio=max_bad_ratio)
    report.num_rows = dropped.num_rows
    report.dropped = dict(sorted(dropped.counts.items()))
    report.examples = dict(sorted(dropped.examples.items()))
    _write_report(report, dest)
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


def _splits(raw_dir: Path) -> list[str]:
    found = [split for split in SPLITS if (raw_dir / f"{split}.jsonl").is_file()]
    if not found:
        names = ", ".join(f"{split}.jsonl" for split in SPLITS)
        raise DataError(f"{raw_dir} holds no dataset: expected at least one of {names}.")
    return found


@contextmanager
def _mapper(num_workers: int) -> Iterator[Callable]:
    """A `map` that keeps the order, over processes or in this one."""
    if num_workers == 1:
        yield map
        return
    # spawn: a fork of a process that already has threads (Prefect's) may hang
    with ProcessPoolExecutor(
        num_workers, mp_context=get_context("spawn"), initializer=_end_with_parent
    ) as pool:
        yield pool.map


def _end_with_parent() -> None:
    """Without this, a pool's processes wait for work for ever once their parent is killed -9."""

    def watch(parent: BaseProcess) -> None:
        parent.join()
        os._exit(1)

    parent = parent_process()
    assert parent is not None, "only for the processes of a pool"
    threading.Thread(target=watch, args=(parent,), daemon=True).start()


def _write_range(
    rows: RowRange, *, dest: Path, data_format: str, max_shard_bytes: int
) -> tuple[list[Shard], Dropped]:
    """Check and write some rows as `.{split}-{line}.{part}.part`: as many parts as bytes require,
    none where no row is usable, for energon refuses an empty shard."""
    dropped, shards = Dropped(), []
    samples = read_samples(rows, parse=find_format(data_format), dropped=dropped)
    parts = groupby(_number_parts(samples, max_shard_bytes=max_shard_bytes), key=itemgetter(0))
    for part, numbered in parts:
        shard = Shard(dest / f".{rows.table.stem}-{rows.first_line:012d}.{part}.part")
        with tarfile.open(shard.path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for _, members in numbered:
                for name, data in members:
                    info = tarfile.TarInfo(name)  # its defaults are time 0, uid 0, mode 644
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                shard.num_samples += 1
                shard.num_images += len(members) - 1
        shards.append(shard)
    return shards, dropped


def _number_parts(
    samples: Iterable[RawSample], *, max_shard_bytes: int
) -> Iterator[tuple[int, list[Member]]]:
    """Each sample's members, with the number of the part that still has room for them."""
    part, part_bytes = 0, 0
    for sample in samples:
        members = _members(sample)
        size_bytes = sum(_tar_size(len(data)) for _, data in members)
        if part_bytes and part_bytes + size_bytes > max_shard_bytes:
            part, part_bytes = part + 1, 0
        part_bytes += size_bytes
        yield part, members


def _members(sample: RawSample) -> list[Member]:
    names = [f"{index}.{image.extension}" for index, image in enumerate(sample.images)]
    conversation = {"messages": sample.messages, "images": names}
    text = json.dumps(conversation, ensure_ascii=False, separators=(",", ":"))
    members = [(f"{sample.key}.json", text.encode())]
    for name, image in zip(names, sample.images, strict=True):
        members.append((f"{sample.key}.{name}", image.data))
    return members


def _tar_size(num_bytes: int) -> int:
    blocks = -(-num_bytes // tarfile.BLOCKSIZE)
    return (1 + blocks) * tarfile.BLOCKSIZE


def _publish(shards: list[Shard], *, split: str, report: ShardReport) -> None:
    """Give the parts their numbers, without gaps, and enter them into the report."""
    names = [f"{split}-{number:06d}.tar" for number in range(len(shards))]
    for shard, name in zip(shards, names, strict=True):
        shard.path.rename(shard.path.with_name(name))
    report.shards[split] = names
    report.samples[split] = sum(shard.num_samples for shard in shards)
    report.num_images += sum(shard.num_images for shard in shards)


def _check_tolerance(raw_dir: Path, dropped: Dropped, *, max_bad_ratio: float) -> None:
    num_bad = dropped.counts.total()
    if num_bad:
        log.warning("%s: %d of %d rows left out", raw_dir, num_bad, dropped.num_rows)
    if dropped.ratio > max_bad_ratio:
        raise DataError(
            f"{raw_dir}: {num_bad} of {dropped.num_rows} rows ({dropped.ratio:.1%}) are unusable, "
            f"max_bad_ratio allows {max_bad_ratio:.1%}. Mend the rows or raise max_bad_ratio.\n"
            + dropped.describe()
        )


def _write_report(report: ShardReport, dest: Path) -> None:
    text = json.dumps(asdict(report), indent=2, ensure_ascii=False)
    (dest / REPORT_NAME).write_text(text + "\n", encoding="utf-8")
