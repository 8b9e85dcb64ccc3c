"""`path:LOCATION`: a folder of this machine, an archive, or one table and the images its rows name.

Files are copied: a later edit of the user's own file must not reach into a finished artifact.
"""

import hashlib
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory

from data_prep.column_files import column_texts
from data_prep.files import is_inside
from data_prep.progress import Progress
from data_prep.rows import read_rows, row_ranges
from data_prep.sources.archives import COMPRESSED_TABLES, unpack
from data_prep.sources.wanted import Wanted
from data_prep.tables import KINDS
from vlmcore.errors import DataError

ROWS_AT_ONCE = 10_000
_NAME = re.compile(r"[^\n]{1,250}\.\w{1,5}")  # what is looked for as a file


def collect(
    location: str, scratch: Path, *, wanted: Wanted, pinned: str, on_progress: Progress
) -> Mapping[str, Path]:
    """The files of the folder, those that `include` names; a table, and what its rows name.

    Raises:
        DataError: nothing is there.
    """
    return _files(location, wanted)


def fingerprint(location: str, *, wanted: Wanted) -> str:
    """sha256 over name, size and time of change of every file: bytes are not read."""
    digest = hashlib.sha256()
    for name, file in _files(location, wanted).items():
        stat = file.stat()
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _files(location: str, wanted: Wanted) -> dict[str, Path]:
    """Name inside the dataset → file on this machine, sorted by name."""
    wanted.refuse("revision", source=f"path:{location}")
    root = Path(location).expanduser()
    if root.is_dir():
        found = {file.relative_to(root).as_posix(): file for file in root.rglob("*")}
    elif root.is_file():
        found = {name: root.parent / name for name in _named_files(root, wanted.media_dir)}
        found[root.name] = root
    else:
        raise DataError(f"data source 'path:{location}': nothing is there. Check the path.")
    names = (
        name
        for name in sorted(found)
        if not wanted.include or any(fnmatchcase(name, one) for one in wanted.include)
    )
    # os.path: a name too long for the filesystem is no file, where Path raises
    return {name: found[name] for name in names if os.path.isfile(found[name])}  # noqa: PTH113


def _named_files(table: Path, media_dir: str) -> set[str]:
    """Every text of a row that may name a file, but no other table.

    Rows that do not parse are counted elsewhere.
    """
    texts = (text for row in _rows(table) for text in _texts(row) if _NAME.fullmatch(text))
    names = {posixpath.join(media_dir, text) for text in texts if not text.endswith(KINDS)}
    return {name for name in names if is_inside(name)}


def _rows(table: Path) -> Iterator[object]:
    """Rows, or of files that hold bytes beside texts each text by itself."""
    with TemporaryDirectory() as unpacked:
        if table.name.lower().endswith(COMPRESSED_TABLES):
            unpack(table, Path(unpacked))
            (table,) = Path(unpacked).iterdir()
        if table.suffix in (".jsonl", ".json", ".csv", ".tsv"):
            for rows in row_ranges(table, key_prefix="", max_rows=ROWS_AT_ONCE):
                yield from (row for _, row in read_rows(rows))
        elif table.suffix in (".parquet", ".arrow"):
            yield from column_texts(table)


def _texts(value: object) -> Iterator[str]:
    """Texts wherever they stand: a recipe may rename columns, and content parts hold media."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)
