"""Shards made in a folder of the user's own, where no store of artifacts keeps what is unfinished.

Beside the shards lies, until they are whole, what the next call takes up if this one is killed:

    .raw-KEY     what was fetched
    .work-KEY    the finished parts of a conversion
    .parts-…     a folder for parts that nobody goes on with: nothing is in it
    .dealt       shards dealt anew, on their way to the place of the old
"""

import hashlib
import json
import shutil
from pathlib import Path

from data_prep import SPLITS
from data_prep.convert import convert, deal_of
from data_prep.energon import prepare
from data_prep.progress import Progress
from data_prep.shards import REPORT_NAME, ShardReport, read_report
from data_prep.sources import Wanted, fetch, fingerprint
from data_prep.sources.archives import is_archive
from data_prep.splits import deal
from data_prep.tables import KINDS, find_tables
from vlmcore.errors import DataError
from vlmcore.recipe.schema import Dataset

Tables = dict[str, list[Path]]

DEALT = ".dealt"


def require_room(dest: Path) -> None:
    """Let a new or empty folder pass, and one that a killed conversion left.

    Raises:
        DataError: the folder holds finished shards, or something else.
    """
    if (dest / REPORT_NAME).exists():
        raise DataError(f"{dest} holds finished shards already. Remove it or take another folder.")
    others = [path.name for path in dest.iterdir() if path.name[:1] != "."] if dest.exists() else []
    if any(not _is_shard(name) for name in others):
        found = ", ".join(sorted(others)[:3])
        raise DataError(f"{dest} is not empty ({found}). Take a new folder.")


def find_or_fetch(dest: Path, dataset: Dataset, *, on_progress: Progress) -> tuple[Path, Tables]:
    """The folder that media are looked for in, and the tables by split.

    Folders and tables of this machine are read where they are; everything else is fetched first,
    and so is a folder that holds an archive: its images may be in it.

    Raises:
        DataError: nothing is there, or no table of rows.
    """
    scheme, _, location = dataset.source.partition(":")
    src = Path(location).expanduser()
    if scheme == "path" and not src.exists():
        raise DataError(f"{src}: nothing is there. Check the path.")
    root = src if scheme == "path" and _is_read_there(src) else _fetched(dest, dataset, on_progress)
    tables = find_tables(root, subset=dataset.subset, split=dataset.split)
    return (root.parent if root.is_file() else root), tables


def convert_in_place(
    dest: Path, dataset: Dataset, *, raw_dir: Path, tables: Tables, on_progress: Progress
) -> ShardReport:
    """Write the shards of what `find_or_fetch` found, and remove what was kept for them.

    Raises:
        DataError: there are no rows, none is usable, or too many are not.
    """
    report = convert(
        raw_dir,
        dest,
        dataset,
        work_dir=dest / f".work-{_key(dataset, tables)}",
        tables=tables,
        on_progress=on_progress,
    )
    for kept in (".raw-*", ".work-*", ".parts-*"):
        for stale in dest.glob(kept):
            shutil.rmtree(stale)
    return report


def prepare_in_place(dest: Path, dataset: Dataset) -> ShardReport:
    """Index finished shards for energon; where the dataset has split ratios, deal them anew first.

    Raises:
        DataError: the folder holds no finished shards, or they cannot be split like that.
    """
    _take_dealt(dest)
    read_report(dest)
    if dataset.split_ratios is not None:
        shutil.rmtree(dest / DEALT, ignore_errors=True)
        deal(dest, dest / DEALT, deal_of(dataset))
        _take_dealt(dest)
    prepare(dest, dest, sample_type=dataset.sample_type)
    return read_report(dest)


def _is_read_there(src: Path) -> bool:
    """Whether a place holds a table and no archive."""
    has_table = False
    for one in src.rglob("*") if src.is_dir() else [src]:
        if is_archive(one):
            return False
        has_table = has_table or one.name.endswith(KINDS)
    return has_table


def _fetched(dest: Path, dataset: Dataset, on_progress: Progress) -> Path:
    """The raw dataset beside the shards to come; a killed download is gone on with."""
    wanted = Wanted.of(dataset)
    pinned = fingerprint(dataset.source, wanted=wanted)
    key = _digest(repr((dataset.source, wanted, pinned)))
    raw, unfinished = dest / f".raw-{key}", dest / f".raw-{key}.unfinished"
    if raw.exists():
        return raw
    shutil.rmtree(unfinished / "rows", ignore_errors=True)
    (unfinished / "scratch").mkdir(parents=True, exist_ok=True)
    try:
        fetch(
            dataset.source,
            unfinished / "rows",
            options=dataset.options,
            seed=0,
            wanted=wanted,
            pinned=pinned,
            scratch=unfinished / "scratch",
            on_progress=on_progress,
        )
    except DataError:  # an archive may have been refused: what it has grown to does not stay
        shutil.rmtree(unfinished / "rows", ignore_errors=True)
        raise
    (unfinished / "rows").rename(raw)
    shutil.rmtree(unfinished)
    return raw


def _key(dataset: Dataset, tables: Tables) -> str:
    """Changes when what would be written does, so that no other conversion's parts are taken up."""
    files = [
        (split, str(file), file.stat().st_size, file.stat().st_mtime_ns)
        for split, many in tables.items()
        for file in many
    ]
    return _digest(json.dumps([dataset.content_params(), files]))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _take_dealt(dest: Path) -> None:
    """Move what was dealt to its place; a killed call's move is carried on by the next one's."""
    fresh = dest / DEALT
    if not (fresh / REPORT_NAME).exists():
        return
    (dest / REPORT_NAME).unlink(missing_ok=True)  # until the end these are no finished shards
    names = {name for names in read_report(fresh).shards.values() for name in names}
    for name in names:
        if (fresh / name).exists():
            (fresh / name).replace(dest / name)
    for path in dest.iterdir():
        if _is_shard(path.name) and path.name not in names:
            path.unlink()
    (fresh / REPORT_NAME).replace(dest / REPORT_NAME)
    fresh.rmdir()


def _is_shard(name: str) -> bool:
    """Whether a killed conversion may have put it there."""
    return name.endswith(".tar") and name.partition("-")[0] in SPLITS
