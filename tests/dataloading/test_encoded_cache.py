"""Entries on disk: read and written by many at once, killed, damaged, without room."""

import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vlmcore.dataloading import encoded_cache
from vlmcore.dataloading.encoded_cache import EncodedCache

KEY, OTHER = "0123456789abcdef", "01ffffffffffffff"


def tensors(length: int = 1000) -> dict[str, Tensor]:
    return {
        "ids": torch.arange(length),
        "positions": torch.arange(5).expand(3, -1),
        "pixels": torch.arange(length, dtype=torch.float32).view(2, -1).T / 7,
        "bytes": torch.arange(7, dtype=torch.uint8),
    }


def assert_same(found: dict[str, Tensor] | None, expected: dict[str, Tensor]) -> None:
    assert found is not None and found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_what_is_put_is_found_by_others_and_nothing_else_is(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    cache = EncodedCache(folder)
    assert cache.get(KEY) is None
    assert not folder.exists()
    cache.put(KEY, tensors())
    assert_same(EncodedCache(folder).get(KEY), tensors())
    assert cache.get(OTHER) is None
    cache.put(KEY, tensors(20))
    assert_same(cache.get(KEY), tensors(20))
    assert len(files(folder)) == 1


@pytest.mark.parametrize("where", ["digest", "size", "body", "end", "empty", "folder"])
def test_a_damaged_entry_is_no_entry_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    cache = EncodedCache(tmp_path)
    for key in (KEY, OTHER):
        cache.put(key, tensors())
    for path in files(tmp_path):
        content = bytearray(path.read_bytes())
        if where == "empty":
            content.clear()
        elif where == "end":
            del content[-1]
        else:
            content[{"digest": 3, "size": 18, "body": 40}.get(where, 0)] ^= 1
        path.write_bytes(content)
        if where == "folder":
            path.unlink()
            path.mkdir()
    with caplog.at_level(logging.WARNING):
        assert cache.get(KEY) is cache.get(OTHER) is None
    assert len(caplog.messages) == 1 and str(tmp_path) in caplog.messages[0]
    if where != "folder":
        cache.put(KEY, tensors(20))
        assert_same(cache.get(KEY), tensors(20))


@pytest.fixture
def small_files() -> Iterator[None]:
    """A write fails where its file would grow past 100 KB, having written so much."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_ends_writing_with_one_line_and_leaves_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, small_files: None
) -> None:
    cache = EncodedCache(tmp_path)
    cache.put(KEY, tensors())
    incompressible = {"noise": torch.randint(256, (300_000,), dtype=torch.uint8)}
    cache.put(OTHER, incompressible)
    cache.put(OTHER, tensors())
    assert [str(tmp_path) in message for message in caplog.messages] == [True]
    assert_same(cache.get(KEY), tensors())
    assert cache.get(OTHER) is None
    assert len(files(tmp_path)) == 1


def test_the_rest_of_the_disk_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(encoded_cache, "MIN_FREE", (disk.free + disk.used) / disk.total)
    cache = EncodedCache(tmp_path)
    for key in (KEY, OTHER):
        cache.put(key, tensors())
    assert files(tmp_path) == []
    assert len(caplog.messages) == 1 and "of the disk" in caplog.messages[0]


def test_the_folder_may_be_deleted_meanwhile(tmp_path: Path) -> None:
    cache = EncodedCache(tmp_path / "encoded")
    cache.put(KEY, tensors())
    shutil.rmtree(tmp_path / "encoded")
    assert cache.get(KEY) is None
    cache.put(KEY, tensors())
    assert_same(cache.get(KEY), tensors())


def test_drafts_of_killed_processes_go_and_those_of_live_ones_stay(tmp_path: Path) -> None:
    drafts = tmp_path / "drafts"
    drafts.mkdir()
    for name, age_s in (("killed", 2 * 3600), ("live", 60)):
        (drafts / name).write_bytes(b"half")
        os.utime(drafts / name, (time.time() - age_s,) * 2)
    EncodedCache(tmp_path)
    assert [path.name for path in drafts.iterdir()] == ["live"]


WRITER = """
import sys
from pathlib import Path
import torch
from vlmcore.dataloading.encoded_cache import EncodedCache
torch.set_num_threads(1)
cache, first = EncodedCache(Path(sys.argv[1])), int(sys.argv[2])
print("ready", flush=True)
for i in range(10**9):
    key = f"{(first + i) % 40:032d}"
    found = cache.get(key)
    assert found is None or found["ids"].tolist() == list(range(5000 + int(key))), key
    cache.put(key, {"ids": torch.arange(5000 + int(key))})
"""


@pytest.mark.slow
def test_processes_that_are_killed_while_they_write_leave_only_whole_entries(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "encoded"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder), str(first)], stdout=subprocess.PIPE
        )
        for first in (0, 20)
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
    time.sleep(1.5)
    for writer in writers:
        assert writer.poll() is None  # every entry that it found was whole
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    cache = EncodedCache(folder)
    found = [cache.get(f"{key:032d}") for key in range(40)]
    assert [len(one["ids"]) for one in found if one] == [5000 + key for key in range(40)]
    assert caplog.messages == []
