"""Rows of tables, read a range at a time: JSONL, a JSON list, columns, webdataset tars.

A range is found without reading the rows before it, so that any process can take any range.
"""

import json
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.causes import BadRowError
from data_prep.column_files import (
    cut_arrow,
    cut_csv,
    cut_parquet,
    read_arrow,
    read_csv,
    read_parquet,
)
from data_prep.conversation import TAGS
from data_prep.tars import read_tar_samples
from vlmcore.errors import DataError

JSON_CHUNK = 1 << 20
BOM = b"\xef\xbb\xbf"  # as some editors begin a file
IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
VIDEO_MEMBERS = ("mp4", "mov", "webm", "mkv", "avi")

Row = dict[str, Any] | BadRowError


@dataclass(frozen=True)
class RowRange:
    """Some consecutive rows of a table.

    Attributes:
        key_prefix: what stands before a row's number in the key of its sample.
        offset: where the range starts: a row of a parquet or Arrow file, a byte of any other.
        first: number of the first row, counted from 1; of a JSONL file, as editors count lines.
        picked: numbers of the rows that are read; None: all.
    """

    table: Path
    key_prefix: str
    offset: int
    first: int
    num_rows: int
    picked: frozenset[int] | None = None

    @property
    def num_wanted(self) -> int:
        """How many of its rows are read."""
        return self.num_rows if self.picked is None else len(self.picked)


@dataclass(frozen=True)
class Pick:
    """Which rows of a split are read: its first `limit`, and of those `sample` drawn at random."""

    limit: int | None = None
    sample: int | None = None
    seed: int = 0


def row_ranges(table: Path, *, key_prefix: str, max_rows: int) -> Iterator[RowRange]:
    """Cut a table into ranges of at most `max_rows` rows, without holding them.

    Raises:
        DataError: a table that is no JSONL does not open or is not whole.
    """
    first = 1
    for offset, num_rows in _CUTTERS[_kind(table)](table, max_rows):
        yield RowRange(table, key_prefix, offset, first, num_rows)
        first += num_rows


def split_ranges(split: str, files: Sequence[Path], *, max_rows: int, pick: Pick) -> list[RowRange]:
    """The ranges of all tables of a split.

    Raises:
        DataError: a table that is no JSONL does not open or is not whole.
    """
    ranges = _limited(_cut_all(split, files, max_rows), pick.limit)
    total = sum(rows.num_rows for rows in ranges)
    if pick.sample is None or pick.sample >= total:
        return ranges
    # ranges as much longer as rows are fewer: shards keep their size
    longer = max_rows * (total // pick.sample)
    ranges = _limited(_cut_all(split, files, longer), pick.limit)
    drawn = sorted(random.Random(f"{pick.seed}:{split}").sample(range(total), pick.sample))
    picked, done, numbers = [], 0, iter([*drawn, total])
    number = next(numbers)
    for rows in ranges:
        mine = set()
        while number < done + rows.num_rows:
            mine.add(rows.first + number - done)
            number = next(numbers)
        done += rows.num_rows
        picked.append(replace(rows, picked=frozenset(mine)))
    return [rows for rows in picked if rows.picked]


def _cut_all(split: str, files: Sequence[Path], max_rows: int) -> list[RowRange]:
    # rows of the only file of a split are known by their number alone
    prefixes = [split] if len(files) == 1 else [f"{split}-{n:03d}" for n in range(len(files))]
    return [
        rows
        for file, prefix in zip(files, prefixes, strict=True)
        for rows in row_ranges(file, key_prefix=prefix, max_rows=max_rows)
    ]


def _limited(ranges: list[RowRange], limit: int | None) -> list[RowRange]:
    if limit is None:
        return ranges
    kept = []
    for rows in ranges:
        if limit > 0:
            kept.append(replace(rows, num_rows=min(limit, rows.num_rows)))
            limit -= rows.num_rows
    return kept


def read_rows(rows: RowRange) -> Iterator[tuple[int, Row]]:
    """The rows of a range with their numbers; in place of one that does not parse, why.

    Blank lines of a JSONL file are no rows.
    """
    kind = _kind(rows.table)
    if kind in _COLUMNS:
        return enumerate(_COLUMNS[kind](rows.table, rows.offset, rows.num_rows), rows.first)
    return _READERS[kind](rows)


def _kind(table: Path) -> str:
    """The suffix; hubs hold many a `.json` with an object a line, which is a `.jsonl`."""
    if table.suffix == ".json":
        with table.open("rb") as file:
            if file.read(64).removeprefix(BOM).lstrip()[:1] == b"{":
                return ".jsonl"
    return table.suffix


def _cut_lines(table: Path, max_rows: int) -> Iterator[tuple[int, int]]:
    with table.open("rb") as file:
        while True:
            offset = file.tell()
            num_lines = sum(1 for _ in islice(iter(file.readline, b""), max_rows))
            if not num_lines:
                return
            yield offset, num_lines


def _lines(rows: RowRange) -> Iterator[tuple[int, Row]]:
    with rows.table.open("rb") as file:
        file.seek(rows.offset)
        for number in range(rows.first, rows.first + rows.num_rows):
            line = file.readline()
            if line.strip():
                yield number, _parse(line)


def _parse(line: bytes) -> Row:
    try:
        return _as_row(json.loads(line))
    except (ValueError, RecursionError) as error:  # ValueError: also bytes that are not UTF-8
        return BadRowError("bad_json", str(error))


def _as_row(value: object) -> Row:
    if isinstance(value, dict):
        return value
    return BadRowError("bad_row", f"a {type(value).__name__}, not an object")


def _cut_list(table: Path, max_rows: int) -> Iterator[tuple[int, int]]:
    start, count = 0, 0
    for offset, _ in _items(table, None):
        if not count:
            start = offset
        count += 1
        if count == max_rows:
            yield start, count
            count = 0
    if count:
        yield start, count


def _list(rows: RowRange) -> Iterator[tuple[int, Row]]:
    for number, (_, value) in enumerate(
        islice(_items(rows.table, rows.offset), rows.num_rows), rows.first
    ):
        yield number, _as_row(value)


def _items(table: Path, start: int | None) -> Iterator[tuple[int, object]]:
    """(byte offset, value) of the items of a JSON list, from an item's offset on."""
    decoder = json.JSONDecoder()
    with table.open("rb") as file:
        if start is None:
            start = _after_bracket(table, file.read(64))
        file.seek(start)
        text, at_end = "", False
        pending = b""
        while True:
            stripped = text.lstrip(" \t\r\n,")
            start += len(text[: len(text) - len(stripped)])  # blanks and commas are ASCII
            text = stripped
            if text.startswith("]"):
                return
            try:
                value, end = decoder.raw_decode(text)
                # a number at the end of what was read may go on
                if end == len(text) and not at_end:
                    raise json.JSONDecodeError("cut", text, end)
            except (json.JSONDecodeError, RecursionError) as error:
                chunk = file.read(max(JSON_CHUNK, len(text)))
                if not chunk:
                    raise DataError(
                        f"{table} is not a whole JSON list: {error} after byte {start}. "
                        "Mend it, or write one row a line as .jsonl."
                    ) from error
                more, pending = _decoded(pending + chunk, table)
                text += more
                continue
            yield start, value
            start += len(text[:end].encode())
            text = text[end:]


def _after_bracket(table: Path, head: bytes) -> int:
    body = head.removeprefix(BOM)
    stripped = body.lstrip()
    if not stripped.startswith(b"["):
        raise DataError(f"{table} is no JSON list of rows. Expected it to begin with `[`.")
    return len(head) - len(stripped) + 1


def _decoded(data: bytes, table: Path) -> tuple[str, bytes]:
    """The text of the bytes, and those at the end that are only the start of a character."""
    try:
        return data.decode(), b""
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data" and len(data) - error.start < 4:
            return data[: error.start].decode(), data[error.start :]
        raise DataError(f"{table} is not UTF-8: {error}") from error


def _cut_tar(table: Path, max_rows: int) -> Iterator[tuple[int, int]]:
    samples = _tar_samples(table, 0)
    while chunk := [offset for offset, _, _ in islice(samples, max_rows)]:
        yield chunk[0], len(chunk)


def _tar(rows: RowRange) -> Iterator[tuple[int, Row]]:
    samples = islice(_tar_samples(rows.table, rows.offset), rows.num_rows)
    for number, (_, _, members) in enumerate(samples, rows.first):
        yield number, _member_row(members)


def _tar_samples(table: Path, offset: int) -> Iterator[tuple[int, str, dict[str, bytes]]]:
    try:
        yield from read_tar_samples(table, offset=offset)
    except tarfile.TarError as error:
        raise DataError(f"{table} is no whole tar: {error}. Fetch it again.") from error


def _member_row(members: dict[str, bytes]) -> Row:
    """A webdataset sample as a row: its JSON, texts, and its media as bytes."""
    row: dict[str, Any] = {}
    if "json" in members:
        parsed = _parse(b'{"conversations":' + members["json"] + b"}")
        if isinstance(parsed, BadRowError):
            return parsed
        value = parsed["conversations"]
        row = value if isinstance(value, dict) else parsed
    for name in ("txt", "caption"):
        if name in members and "text" not in row:
            row["text"] = members[name].decode(errors="surrogateescape")
    for plural in TAGS:
        named = row.get(plural)
        if isinstance(named, list):
            row[plural] = [members.get(one, one) if isinstance(one, str) else one for one in named]
    _add_unnamed(row, "image", "images", IMAGE_MEMBERS, members)
    _add_unnamed(row, "video", "videos", VIDEO_MEMBERS, members)
    return row


def _add_unnamed(
    row: dict, single: str, plural: str, extensions: tuple[str, ...], members: dict[str, bytes]
) -> None:
    """Members that the JSON does not name: all of that kind, in the tar's order."""
    if row.get(plural) is None:
        found = [members[name] for name in members if name.rpartition(".")[2].lower() in extensions]
        row.pop(single, None)  # a path of the machine where the tar was made
        row[plural] = found


_CUTTERS: dict[str, Callable[[Path, int], Iterator[tuple[int, int]]]] = {
    ".jsonl": _cut_lines, ".parquet": cut_parquet, ".arrow": cut_arrow, ".json": _cut_list,
    ".csv": cut_csv, ".tsv": cut_csv, ".tar": _cut_tar,
}  # fmt: skip
_COLUMNS: dict[str, Callable[[Path, int, int], Iterator[Row]]] = {
    ".parquet": read_parquet, ".arrow": read_arrow, ".csv": read_csv, ".tsv": read_csv,
}  # fmt: skip
_READERS: dict[str, Callable[[RowRange], Iterator[tuple[int, Row]]]] = {
    ".jsonl": _lines, ".json": _list, ".tar": _tar,
}  # fmt: skip
