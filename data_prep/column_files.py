"""Rows of tables that have columns: parquet, Arrow (as `save_to_disk` writes it), CSV and TSV."""

import csv
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from data_prep.causes import BadRowError
from vlmcore.errors import DataError

PARQUET_BATCH = 64  # rows held at once: their images may be large
MAX_CELL_CHARS = 1 << 30  # an image as base64; Python's own limit is 128 kB
# Columns that hold more than a text; in a CSV they are written as JSON.
JSON_COLUMNS = (
    "messages", "conversations", "conversation", "images", "videos", "audios", "history",
)  # fmt: skip


def cut_parquet(table: Path, max_rows: int) -> Iterator[tuple[int, int]]:
    """(first row, number of rows) of ranges of at most `max_rows` rows."""
    return _ranges(_open_parquet(table).metadata.num_rows, max_rows)


def read_parquet(table: Path, offset: int, num_rows: int) -> Iterator[dict]:
    """Some rows, of which only their row groups are read."""
    file = _open_parquet(table)
    position, end = 0, offset + num_rows
    for group in range(file.metadata.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if position + size > offset and position < end:
            batches = file.iter_batches(batch_size=PARQUET_BATCH, row_groups=[group])
            yield from _rows_of(batches, position, offset, end)
        position += size


def cut_arrow(table: Path, max_rows: int) -> Iterator[tuple[int, int]]:
    """(first row, number of rows) of ranges of at most `max_rows` rows."""
    return _ranges(sum(batch.num_rows for batch in _arrow_batches(table)), max_rows)


def read_arrow(table: Path, offset: int, num_rows: int) -> Iterator[dict]:
    """Some rows; those before them are mapped, not read."""
    return _rows_of(_arrow_batches(table), 0, offset, offset + num_rows)


def column_texts(table: Path) -> Iterator[str]:
    """Every text of a parquet or Arrow file, however deep it stands; bytes are not read."""
    for batch in _text_batches(table) if table.suffix == ".parquet" else _arrow_batches(table):
        for column in batch.columns:
            yield from _texts(column)


def cut_csv(table: Path, max_rows: int) -> Iterator[tuple[int, int]]:
    """(byte, number of rows) of ranges of at most `max_rows` rows."""
    records = _records(table)
    next(records, None)  # the names of the columns
    while chunk := [start for start, _ in islice(records, max_rows)]:
        yield chunk[0], len(chunk)


def read_csv(table: Path, offset: int, num_rows: int) -> Iterator[dict | BadRowError]:
    """Some rows by the names in the first line; empty cells are none."""
    _, names = next(_records(table))
    if isinstance(names, BadRowError):
        raise DataError(f"{table}: its first line names no columns: {names.detail}.")
    for _, cells in islice(_records(table, offset), num_rows):
        if isinstance(cells, BadRowError):
            yield cells
        elif len(cells) != len(names):
            yield BadRowError("bad_row", f"{len(cells)} cells under {len(names)} columns")
        else:
            yield {name: _cell(name, text) for name, text in zip(names, cells, strict=True) if text}


def _records(table: Path, offset: int = 0) -> Iterator[tuple[int, list[str] | BadRowError]]:
    """(byte where it begins, cells) of each record; a record may span lines."""
    csv.field_size_limit(MAX_CELL_CHARS)
    with table.open("rb") as file:
        file.seek(offset)
        end = offset

        def lines() -> Iterator[str]:
            nonlocal end
            for line in file:
                end += len(line)
                yield line.decode("utf-8-sig" if end == len(line) else "utf-8", "surrogateescape")

        reader = csv.reader(lines(), delimiter="\t" if table.suffix == ".tsv" else ",")
        while True:
            start = end
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield start, BadRowError("bad_row", str(error))
                continue
            if record:  # a blank line is no row
                yield start, record


def _cell(name: str, text: str) -> Any:
    if name in JSON_COLUMNS and text.startswith(("[", "{")):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def _ranges(total: int, max_rows: int) -> Iterator[tuple[int, int]]:
    for offset in range(0, total, max_rows):
        yield offset, min(max_rows, total - offset)


def _rows_of(batches: Any, position: int, offset: int, end: int) -> Iterator[dict]:
    """The rows from `offset` to `end` of batches that begin at row `position`."""
    for batch in batches:
        begins, stops = max(0, offset - position), max(0, end - max(position, offset))
        for start in range(begins, min(batch.num_rows, begins + stops), PARQUET_BATCH):
            number = min(PARQUET_BATCH, begins + stops - start)
            yield from batch.slice(start, number).to_pylist()
        position += batch.num_rows


def _text_batches(table: Path) -> Iterator[Any]:
    """Batches of a parquet file's columns of text alone, also of those inside of others."""
    file = _open_parquet(table)
    leaves = map(file.schema.column, range(len(file.schema)))
    names = [leaf.path for leaf in leaves if leaf.converted_type == "UTF8"]
    return file.iter_batches(batch_size=PARQUET_BATCH, columns=names)


def _texts(column: Any) -> Iterator[str]:
    from pyarrow import types

    kind = column.type
    if types.is_string(kind) or types.is_large_string(kind):
        yield from (text for text in column.to_pylist() if text is not None)
    elif types.is_dictionary(kind):
        yield from _texts(column.dictionary)
    elif types.is_struct(kind):
        for field in column.flatten():
            yield from _texts(field)
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        yield from _texts(column.flatten())


def _arrow_batches(table: Path) -> Iterator[Any]:
    import pyarrow

    try:
        with pyarrow.memory_map(str(table)) as source:
            if source.read(6) == b"ARROW1":  # the file format; `save_to_disk` writes the stream's
                file = pyarrow.ipc.open_file(source)
                yield from map(file.get_batch, range(file.num_record_batches))
            else:
                source.seek(0)
                yield from pyarrow.ipc.open_stream(source)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{table} is no whole Arrow file: {error}. Fetch it again.") from error


def _open_parquet(table: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(table)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{table} is no whole parquet file: {error}. Fetch it again.") from error
