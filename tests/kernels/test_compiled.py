import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vlmcore.kernels import compiled

HAS_COMPILER = pytest.mark.skipif(compiled.library() is None, reason="no compiler or AVX-512")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    compiled.library.cache_clear()
    yield tmp_path / "cache" / "vlmflow" / "kernels"
    compiled.library.cache_clear()


@HAS_COMPILER
def test_what_was_compiled_is_kept_and_taken_again(empty_cache: Path) -> None:
    assert compiled.library() is not None
    (kept,) = empty_cache.iterdir()
    written = kept.stat().st_mtime_ns
    compiled.library.cache_clear()
    assert compiled.library() is not None
    assert [path.stat().st_mtime_ns for path in empty_cache.iterdir()] == [written]


@HAS_COMPILER
def test_ranks_that_start_together_all_get_it(empty_cache: Path) -> None:
    code = "from vlmcore.kernels.compiled import library; assert library() is not None"
    ranks = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [rank.wait() for rank in ranks] == [0, 0, 0]
    assert len(list(empty_cache.iterdir())) == 1


def test_without_a_compiler_torch_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert compiled.library() is None
    assert not compiled.serves(torch.ones(1))


def test_a_compiler_that_fails_is_named_and_torch_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho out of order >&2; exit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with caplog.at_level(logging.WARNING):
        assert compiled.library() is None
    assert "c++" in caplog.text and "out of order" in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_home_that_cannot_be_written_leaves_torch_at_work(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert compiled.library() is None


def test_other_types_and_devices_are_left_to_torch() -> None:
    assert not compiled.serves(torch.ones(1, dtype=torch.float64))
    assert not compiled.serves(torch.ones(1), torch.ones(1, dtype=torch.bfloat16))
    assert not compiled.serves(torch.ones(1, device="meta"))
