import json
import os
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image

from data_prep.formats import RowFormat
from data_prep.shards import read_report, write_shards
from vlmcore.errors import DataError


def members_of(tar_path):
    with tarfile.open(tar_path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def bomb():
    """A PNG of 100,000 x 100,000 pixels in a few bytes."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


def test_images_are_stored_byte_for_byte(make_raw, row, tmp_path):
    raw = make_raw(train=[row("<image><image>Same?", images=["images/b.jpg", "images/a.png"])])
    write_shards(raw, tmp_path / "shards", max_bad_ratio=0, num_workers=1)
    members = members_of(tmp_path / "shards" / "train-000000.tar")
    assert list(members) == ["train-000001.json", "train-000001.0.jpg", "train-000001.1.png"]
    assert members["train-000001.0.jpg"] == (raw / "images/b.jpg").read_bytes()
    assert members["train-000001.1.png"] == (raw / "images/a.png").read_bytes()
    conversation = json.loads(members["train-000001.json"])
    assert conversation["images"] == ["0.jpg", "1.png"]
    assert conversation["messages"][0] == {"role": "user", "content": "<image><image>Same?"}


def test_an_image_is_named_by_what_it_is_not_by_what_it_is_called(make_raw, row, tmp_path):
    raw = make_raw(train=[row(images=["images/my.photo.PNG"])])
    (raw / "images/b.jpg").rename(raw / "images/my.photo.PNG")
    write_shards(raw, tmp_path / "shards", max_bad_ratio=0, num_workers=1)
    assert "train-000001.0.jpg" in members_of(tmp_path / "shards" / "train-000000.tar")


def test_each_split_has_its_own_shards_and_the_report_counts_them(numbers, tmp_path):
    report = write_shards(
        numbers, tmp_path, max_bad_ratio=0, num_workers=1, max_samples_per_shard=15
    )
    assert report.samples == {"train": 40, "val": 6, "test": 10}
    assert (report.num_rows, report.num_images, report.dropped) == (56, 56, {})
    assert report.shards["train"] == [f"train-00000{n}.tar" for n in range(3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["report.json", *(name for names in report.shards.values() for name in names)]
    )
    assert read_report(tmp_path) == report


def test_the_number_of_workers_does_not_change_a_byte(numbers, tmp_path, tree_digest):
    for num_workers in (1, 3):
        write_shards(
            numbers,
            tmp_path / str(num_workers),
            max_bad_ratio=0,
            num_workers=num_workers,
            max_samples_per_shard=7,
        )
    assert len(tree_digest(tmp_path / "1")) == 6 + 1 + 2 + 1
    assert tree_digest(tmp_path / "1") == tree_digest(tmp_path / "3")


def test_workers_end_when_the_process_they_work_for_is_killed():
    code = """
import multiprocessing, time
from data_prep.workers import mapper
if __name__ == "__main__":
    with mapper(2) as run:
        list(run(abs, [1, 2]))
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert workers
    assert all(is_running(pid) for pid in workers)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [pid for pid in workers if is_running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_shard_is_closed_before_it_grows_past_max_shard_bytes(numbers, tmp_path):
    limit = 20_000
    report = write_shards(numbers, tmp_path, max_bad_ratio=0, num_workers=1, max_shard_bytes=limit)
    names = report.shards["train"]
    assert len(names) > 2
    keys = [key for name in names for key in members_of(tmp_path / name) if key.endswith("json")]
    assert keys == [f"train-{number:06d}.json" for number in range(1, 41)]
    for name in names:
        # tar pads its end to a record of 10,240 bytes
        assert (tmp_path / name).stat().st_size <= limit + tarfile.RECORDSIZE


def test_a_sample_larger_than_max_shard_bytes_gets_a_shard_of_its_own(numbers, tmp_path):
    report = write_shards(numbers, tmp_path, max_bad_ratio=0, num_workers=1, max_shard_bytes=1)
    assert len(report.shards["test"]) == report.samples["test"] == 10


def turns(*roles):
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


BAD_ROWS = {
    "truncated line": ("bad_json", b'{"messages": [{"role": "user"'),
    "not UTF-8": ("bad_json", b'{"messages": "\xff\xfe"}'),
    "nested too deep": ("bad_json", b"[" * 100_000),
    "a list": ("bad_row", b"[1, 2]"),
    "no messages": ("bad_row", {"conversations": []}),
    "images is a number": ("bad_row", {**turns("user", "assistant"), "images": 7}),
    "unknown role": ("bad_role", turns("human", "assistant")),
    "no answer": ("bad_role", turns("user")),
    "no turns": ("bad_role", turns()),
    "two users": ("bad_role", turns("user", "user", "assistant")),
    "a role that is no text": ("bad_role", turns(["user"], "assistant")),
    "content is a number": ("bad_content", {"messages": [{"role": "user", "content": 5},
                                                         {"role": "assistant", "content": "x"}]}),
    "half a surrogate": ("bad_content", {"messages": [{"role": "user", "content": "\ud800"},
                                                      {"role": "assistant", "content": "x"}]}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_left_out_and_counted_with_its_line(case, make_raw, row, tmp_path):
    cause, bad = BAD_ROWS[case]
    raw = make_raw(train=[row(), bad, row()])
    report = write_shards(raw, tmp_path / "shards", max_bad_ratio=0.5, num_workers=1)
    assert report.dropped == {cause: 1}
    assert report.examples[cause][0].startswith("train.jsonl:2 ")
    assert report.samples == {"train": 2}
    keys = [name for name in members_of(tmp_path / "shards/train-000000.tar") if "json" in name]
    assert keys == ["train-000001.json", "train-000003.json"]


BAD_IMAGES = {
    "an answer of blanks": ("empty_answer", {"answer": " \n"}, None),
    "a tag too many": ("tag_mismatch", {"question": "<image><image>?"}, None),
    "an image too many": ("tag_mismatch", {"question": "?"}, None),
    "missing": ("missing_image", {}, lambda path: path.unlink()),
    "a folder": ("missing_image", {"images": ["images"]}, None),
    "outside": ("unsafe_path", {"images": ["../a.png"]}, None),
    "absolute": ("unsafe_path", {"images": ["/etc/hostname"]}, None),
    "empty name": ("unsafe_path", {"images": [""]}, None),
    "empty file": ("corrupt_image", {}, lambda path: path.write_bytes(b"")),
    "text": ("corrupt_image", {}, lambda path: path.write_bytes(b"%!PS-Adobe")),
    "cut short": ("truncated_image", {}, lambda path: path.write_bytes(path.read_bytes()[:-40])),
    "a bit flipped": ("corrupt_image", {}, lambda path: path.write_bytes(flipped(path))),
    "a bomb": ("decompression_bomb", {}, lambda path: path.write_bytes(bomb())),
    "a line": ("absurd_size", {}, lambda path: Image.new("RGB", (201, 1)).save(path)),
}


def flipped(path):
    data = bytearray(path.read_bytes())
    data[-14] ^= 1  # inside the checksum of the pixels' chunk: they decode all the same
    return bytes(data)


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_a_bad_image_is_left_out_and_counted(case, make_raw, row, tmp_path):
    cause, fields, damage = BAD_IMAGES[case]
    raw = make_raw(train=[row(**fields), row(images=["images/b.jpg"])])
    if damage:
        damage(raw / "images" / "a.png")
    report = write_shards(raw, tmp_path / "shards", max_bad_ratio=0.5, num_workers=1)
    assert report.dropped == {cause: 1}
    assert report.samples == {"train": 1}


def test_past_max_bad_ratio_the_error_names_the_worst_causes_with_their_lines(
    make_raw, row, tmp_path
):
    gone = row(images=["images/gone.png"])
    raw = make_raw(train=[row(), gone, b"{", gone, row()])
    with pytest.raises(DataError) as error:
        write_shards(raw, tmp_path / "shards", max_bad_ratio=0.59, num_workers=1)
    message = str(error.value)
    assert "3 of 5 rows (60.0%) are unusable, max_bad_ratio allows 59.0%" in message
    assert message.index("2 x missing_image") < message.index("1 x bad_json")
    assert "train.jsonl:2 images/gone.png" in message
    assert not (tmp_path / "shards" / "report.json").exists()
    report = write_shards(raw, tmp_path / "shards", max_bad_ratio=0.6, num_workers=1)
    assert report.dropped == {"bad_json": 1, "missing_image": 2}


def test_only_the_first_examples_of_a_cause_are_kept(make_raw, row, tmp_path):
    raw = make_raw(train=[row()] + [b"{"] * 20)
    report = write_shards(
        raw, tmp_path / "shards", max_bad_ratio=1, num_workers=1, max_samples_per_shard=2
    )
    assert report.dropped == {"bad_json": 20}
    lines = [example.split()[0] for example in report.examples["bad_json"]]
    assert lines == ["train.jsonl:2", "train.jsonl:3", "train.jsonl:4"]
    assert report.shards == {"train": ["train-000000.tar"]}


def test_a_split_without_a_usable_sample_is_an_error_at_any_tolerance(make_raw, row, tmp_path):
    raw = make_raw(train=[row()], val=[b"{"])
    with pytest.raises(DataError, match=r"split val has no usable sample(.|\n)*1 x bad_json"):
        write_shards(raw, tmp_path / "shards", max_bad_ratio=1, num_workers=1)


def test_a_folder_without_a_split_is_an_error_that_names_it(tmp_path):
    with pytest.raises(DataError, match="no table of rows there"):
        write_shards(tmp_path, tmp_path / "shards", max_bad_ratio=0, num_workers=1)


def test_an_unknown_format_is_named_with_the_known_ones():
    with pytest.raises(DataError, match="'massages' is not known. Expected one of alpaca, auto,"):
        RowFormat("massages")


def test_blank_lines_are_no_rows(make_raw, row, tmp_path):
    raw = make_raw(train=[row(), b"  ", row()])
    report = write_shards(raw, tmp_path / "shards", max_bad_ratio=0, num_workers=1)
    assert (report.num_rows, report.samples) == (2, {"train": 2})
