"""Conversions that are cut short or cannot be: what is said, what stays, how the next one ends."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from vlmcore.errors import WeightError
from vlmcore.weights.convert import to_hf, to_mcore
from vlmcore.weights.journal import Progress

WEIGHTS = "model.safetensors"
JOURNAL = "journal.jsonl"
KILLED_HALF_WAY = """
import os, sys
from pathlib import Path
from vlmcore.weights import convert

def hear(done, total):
    if done > total / 2:
        os.kill(os.getpid(), 9)

getattr(convert, sys.argv[1])(
    Path(sys.argv[2]), Path(sys.argv[3]), num_processes=1, on_progress=hear
)
"""
WITHOUT_ROOM = """
import resource, sys
from pathlib import Path
from vlmcore.weights.convert import to_mcore

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
to_mcore(Path(sys.argv[1]), Path(sys.argv[2]))
"""


class Cut(Exception):  # noqa: N818 - an interruption
    pass


def cut_half_way(done: int, total: int) -> None:
    if done > total / 2:
        raise Cut


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def journal_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial") / JOURNAL


def progress_of(target: Path) -> Progress:
    progress = Progress()
    for line in journal_of(target).read_bytes().splitlines():
        progress.take(line)
    return progress


@pytest.fixture
def source(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model("qwen3_vl"), tmp_path / "source")


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> Path:
    """The conversion that nothing disturbs."""
    to_mcore(source, tmp_path / "whole")
    return tmp_path / "whole"


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["to_mcore", "to_hf"])
def test_a_killed_conversion_continues_and_repeats_nothing_that_was_done(
    source: Path, whole: Path, tmp_path: Path, direction: str
) -> None:
    start, target = {"to_mcore": source, "to_hf": whole}[direction], tmp_path / "target"
    command = [sys.executable, "-c", KILLED_HALF_WAY, direction, str(start), str(target)]
    killed = subprocess.run(command, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not target.exists()
    done = progress_of(target).done
    assert done
    convert = {"to_mcore": to_mcore, "to_hf": to_hf}[direction]
    assert convert(start, target, num_processes=2)["resumed"] == len(done)
    convert(start, tmp_path / "at_once")
    assert content(target) == content(tmp_path / "at_once")
    assert not journal_of(target).parent.exists()


def test_an_interrupted_conversion_continues(source: Path, whole: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(Cut):
        to_mcore(source, target, num_processes=1, on_progress=cut_half_way)
    before = journal_of(target).read_bytes()
    with pytest.raises(Cut):  # more than half is there already
        to_mcore(source, target, num_processes=1, on_progress=cut_half_way)
    again = journal_of(target).read_bytes().removeprefix(before)
    assert again.count(b'"done"') <= 1
    to_mcore(source, target)
    assert content(target) == content(whole)


def test_after_a_power_cut_what_did_not_reach_the_disk_is_done_again(
    source: Path, whole: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    with pytest.raises(Cut):
        to_mcore(source, target, num_processes=1, on_progress=cut_half_way)
    boot = next(iter(progress_of(target).done.values())).boot
    journal_of(target).write_bytes(
        journal_of(target).read_bytes().replace(boot.encode(), b"another boot")
    )
    done = len(progress_of(target).done)
    (data,) = journal_of(target).parent.glob("checkpoint/__0_0.distcp")
    with data.open("r+b") as file:  # the disk never got this part
        file.write(bytes(data.stat().st_size // 2))
    assert to_mcore(source, target)["resumed"] == done
    assert content(target) == content(whole)


def test_another_source_or_dtype_starts_anew_and_says_so(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "target"
    with pytest.raises(Cut):
        to_mcore(source, target, num_processes=1, on_progress=cut_half_way)
    with caplog.at_level(logging.WARNING), pytest.raises(Cut):
        to_mcore(source, target, dtype="bfloat16", num_processes=1, on_progress=cut_half_way)
    assert "left by another conversion; starting anew" in caplog.text
    os.utime(source / WEIGHTS, (1, 1))
    assert to_mcore(source, target, dtype="bfloat16")["resumed"] == 0
    to_mcore(source, tmp_path / "at_once", dtype="bfloat16")
    assert content(target) == content(tmp_path / "at_once")


@pytest.mark.slow
def test_a_worker_that_is_killed_is_reported_and_the_rest_goes_on_later(
    source: Path, whole: Path, tmp_path: Path
) -> None:
    before = set(psutil.Process().children())  # of other tests

    def workers() -> list[psutil.Process]:
        return [one for one in psutil.Process().children() if one not in before]

    def kill_one(done: int, total: int) -> None:
        for worker in workers()[:1]:
            worker.kill()

    target = tmp_path / "target"
    with pytest.raises(WeightError, match=r"a worker died \(SIGKILL\).*run the same command again"):
        to_mcore(source, target, num_processes=2, on_progress=kill_one)
    assert not target.exists()
    assert not workers()
    to_mcore(source, target)
    assert content(target) == content(whole)


def test_a_file_size_limit_is_named_as_a_full_disk(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_ROOM, str(source), str(tmp_path / "target")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "the disk is full (File too large); make room and run" in done.stderr
    assert not (tmp_path / "target").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "vlmflow-test", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path) -> Path:
    with (disk / "filler").open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(4096))
            except OSError:
                return disk / "filler"


def test_a_full_disk_is_named_before_anything_is_written(source: Path, small_disk: Path) -> None:
    fill(small_disk).open("r+b").truncate(8 * 2**20 - 100_000)
    with pytest.raises(WeightError, match=r"the disk is full: [\d.]+ MB are needed, 0\.1 MB free"):
        to_mcore(source, small_disk / "target")
    (small_disk / "filler").unlink()
    to_mcore(source, small_disk / "target")


def test_a_disk_that_fills_up_is_named_and_the_conversion_continues(
    source: Path, whole: Path, small_disk: Path
) -> None:
    def fill_half_way(done: int, total: int) -> None:
        if done > total / 2 and not (small_disk / "filler").exists():
            fill(small_disk)

    target = small_disk / "target"
    with pytest.raises(WeightError, match=r"weight.*: the disk is full \(No space left"):
        to_mcore(source, target, num_processes=1, on_progress=fill_half_way)
    assert not target.exists()
    (small_disk / "filler").unlink()
    assert to_mcore(source, target)["resumed"] > 0
    assert content(target) == content(whole)


def test_a_source_with_a_fault_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / WEIGHTS)
    key = "model.visual.merger.norm.weight"
    tensors[key] = tensors[key][:-1].clone()  # no other tensor's shape follows from it
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
    for count in (1, 2):
        with pytest.raises(WeightError, match=rf"{key}: shape"):
            to_mcore(source, tmp_path / "target", num_processes=count)
        assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_folder_of_somebody_else_is_left_alone(source: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "target.partial" / "notes.txt"
    theirs.parent.mkdir()
    theirs.write_text("mine")
    with pytest.raises(WeightError, match="is no conversion's work folder"):
        to_mcore(source, tmp_path / "target")
    assert theirs.read_text() == "mine"


def test_a_config_of_an_unknown_family_is_named(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text()) | {"model_type": "gpt_neox"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightError, match="model_type 'gpt_neox' has no family"):
        to_mcore(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()
