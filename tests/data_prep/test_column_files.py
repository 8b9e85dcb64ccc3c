"""CSV, TSV and Arrow: rows in ranges, what is no row counted, the rest as it was written."""

import csv
import gzip
import json

import datasets
import pyarrow as pa
import pytest

from data_prep.causes import BadRowError
from data_prep.rows import read_rows, row_ranges
from data_prep.shards import write_shards
from data_prep.sources import fetch
from data_prep.tables import find_tables
from vlmcore.errors import DataError

ROWS = [
    {"query": f'What, "{i}"?\nSecond line é', "response": f"{i}\r\nand\tmore", "n": str(i)}
    for i in range(10)
]


def in_ranges(table, max_rows):
    return [pair for rows in row_ranges(table, key_prefix="k", max_rows=max_rows)
            for pair in read_rows(rows)]  # fmt: skip


def write_csv(path, *, bom=False):
    with path.open("w", newline="", encoding="utf-8-sig" if bom else "utf-8") as file:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def write_stream(path):
    datasets.Dataset.from_list(ROWS).save_to_disk(path.parent / "saved")
    (path.parent / "saved" / "data-00000-of-00001.arrow").rename(path)


def write_file(path):
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        for start in range(0, 10, 4):  # batches of 4, 4, 2
            writer.write_table(table.slice(start, 4))


@pytest.mark.parametrize("max_rows", [1, 3, 100])
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("t.csv", write_csv),
        ("t.tsv", write_csv),
        ("t.arrow", write_stream),
        ("f.arrow", write_file),
    ],
)
def test_any_range_gives_the_rows_as_they_were_written(name, write, max_rows, tmp_path):
    write(tmp_path / name)
    assert in_ranges(tmp_path / name, max_rows) == list(enumerate(ROWS, 1))


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_json_file_with_a_row_a_line_is_read_by_lines(mark, tmp_path):
    lines = [json.dumps(row) for row in ROWS]
    (tmp_path / "t.json").write_bytes(mark + "\n".join([*lines, "{"]).encode())
    *found, (number, fault) = in_ranges(tmp_path / "t.json", 4)
    assert found == list(enumerate(ROWS, 1))
    assert (number, fault.cause) == (len(ROWS) + 1, "bad_json")


def test_a_mark_of_utf_8_is_no_part_of_the_first_column(tmp_path):
    write_csv(tmp_path / "t.csv", bom=True)
    assert in_ranges(tmp_path / "t.csv", 4) == list(enumerate(ROWS, 1))


def test_cells_of_json_columns_are_read_and_a_line_of_another_length_is_counted(tmp_path):
    lines = ["query,response,images", 'q,a,"[""x.png"", ""y.png""]"', "q,a", "q,a,x.png", "", "q,,"]
    (tmp_path / "train.csv").write_text("\n".join(lines))
    (_, listed), (_, short), (_, single), (number, empty) = in_ranges(tmp_path / "train.csv", 2)
    assert listed == {"query": "q", "response": "a", "images": ["x.png", "y.png"]}
    assert isinstance(short, BadRowError) and short.cause == "bad_row"
    assert "2 cells under 3 columns" in short.detail
    assert single["images"] == "x.png"
    assert (number, empty) == (4, {"query": "q"})


def test_a_broken_arrow_file_is_named(tmp_path):
    write_file(tmp_path / "t.arrow")
    (tmp_path / "t.arrow").write_bytes((tmp_path / "t.arrow").read_bytes()[:-200])
    with pytest.raises(DataError, match="is no whole Arrow file"):
        in_ranges(tmp_path / "t.arrow", 4)


def test_a_packed_table_brings_the_images_that_its_rows_name(make_raw, row, tmp_path):
    raw = make_raw()
    (raw / "images" / "other.png").write_bytes(b"nobody names it")
    with gzip.open(raw / "train.jsonl.gz", "wt") as file:
        file.write(json.dumps(row()) + "\n")
    fetch(f"path:{raw / 'train.jsonl.gz'}", tmp_path / "fetched", options={}, seed=0)
    assert find_tables(tmp_path / "fetched") == {"train": [tmp_path / "fetched" / "train.jsonl"]}
    assert not (tmp_path / "fetched" / "images" / "other.png").exists()
    report = write_shards(tmp_path / "fetched", tmp_path / "shards", max_bad_ratio=0, num_workers=1)
    assert (report.samples, report.num_images) == ({"train": 1}, 1)
