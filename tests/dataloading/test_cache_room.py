"""What goes of encoded samples when there are too many; by whom, and meanwhile."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vlmcore.dataloading.cache_room import USED_AGAIN_S, make_room
from vlmcore.dataloading.encoded_cache import EncodedCache

KEYS = [f"{i:02x}{i:030x}" for i in range(8)]


def filled(folder: Path) -> EncodedCache:
    """Eight entries of different size, each used an hour after the one before it, days ago."""
    cache = EncodedCache(folder)
    for i, key in enumerate(KEYS):
        cache.put(key, {"noise": torch.randint(256, (10_000 + 100 * i,), dtype=torch.uint8)})
        used = time.time() - 9 * USED_AGAIN_S + 3600 * i
        os.utime(path_of(folder, key), (used, used))
    return cache


def path_of(folder: Path, key: str) -> Path:
    return folder / key[:2] / key[2:]


def left(folder: Path) -> list[str]:
    return [key for key in KEYS if path_of(folder, key).exists()]


def size(folder: Path, *keys: str) -> int:
    return sum(path_of(folder, key).stat().st_size for key in keys)


def test_the_longest_unused_go_and_no_more_than_must(tmp_path: Path) -> None:
    cache = filled(tmp_path)
    assert cache.get(KEYS[0]) is not None  # the oldest is used again
    gone = size(tmp_path, KEYS[1], KEYS[2])
    fits = size(tmp_path, *KEYS) - gone
    assert make_room(tmp_path, fits) == gone
    assert left(tmp_path) == [KEYS[0], *KEYS[3:]]
    assert make_room(tmp_path, fits) == 0
    assert make_room(tmp_path, fits - 1) == size(tmp_path, KEYS[4]) - 100  # that of KEYS[3]
    assert left(tmp_path) == [KEYS[0], *KEYS[4:]]


def test_use_is_noted_once_a_day(tmp_path: Path) -> None:
    cache = filled(tmp_path)
    path = path_of(tmp_path, KEYS[0])
    cache.get(KEYS[0])
    noted = path.stat().st_mtime
    assert time.time() - noted < 60
    recent = time.time() - USED_AGAIN_S / 2
    os.utime(path, (recent, recent))
    cache.get(KEYS[0])
    assert path.stat().st_mtime == pytest.approx(recent)


def test_a_folder_that_is_not_there_has_room(tmp_path: Path) -> None:
    assert make_room(tmp_path / "none", 1) == 0
    assert not (tmp_path / "none").exists()


def test_drafts_of_others_are_left_to_them(tmp_path: Path) -> None:
    filled(tmp_path)
    draft = tmp_path / "drafts" / "of-another"
    draft.write_bytes(b"x" * 1000)
    make_room(tmp_path, 1)
    assert left(tmp_path) == []
    assert draft.exists()


def test_several_that_make_room_and_are_killed_leave_what_is_whole(tmp_path: Path) -> None:
    cache = EncodedCache(tmp_path)
    many = [f"{i % 256:02x}{i:030x}" for i in range(3000)]
    for key in many:
        path_of(tmp_path, key).parent.mkdir(exist_ok=True)
        path_of(tmp_path, key).write_bytes(b"")
    cache.put(KEYS[0], {"ids": torch.arange(5)})
    whole = path_of(tmp_path, KEYS[0]).read_bytes()
    for key in many:
        path_of(tmp_path, key).write_bytes(whole)
    code = (
        "import sys; from pathlib import Path; from vlmcore.dataloading.cache_room import make_room"
        "; print('begins', flush=True); print(make_room(Path(sys.argv[1]), int(sys.argv[2])))"
    )
    fits = len(whole) * 100
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), str(fits)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "begins\n"
    workers[0].send_signal(signal.SIGKILL)
    for worker in workers[1:]:
        _, errors = worker.communicate(timeout=60)
        assert (worker.returncode, errors) == (0, "")
    workers[0].communicate()
    kept = [key for key in many if path_of(tmp_path, key).exists()]
    assert 0 < len(kept) <= 100
    assert all(cache.get(key) is not None for key in kept)
