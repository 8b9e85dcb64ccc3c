"""The C++ of this room as a library, compiled once on the machine that runs it.

Kept under `$XDG_CACHE_HOME/vlmflow` for this very source, compiler and processor. Without a
compiler, or without AVX-512, where nothing was measured, callers use torch's operations.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FLAGS = ("-std=gnu++17", "-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp-simd",
         "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-pthread")  # fmt: skip
COMPILERS = ("c++", "g++", "clang++")  # where CXX names none
TIMEOUT_S = 300

log = logging.getLogger(__name__)


@lru_cache
def library() -> ctypes.CDLL | None:
    """The functions of every C++ file in this folder; None where they cannot be had.

    Ranks that start together may each compile them: the last one's file stays.
    """
    compiler = shutil.which(os.environ.get("CXX", "")) or next(
        filter(None, map(shutil.which, COMPILERS)), None
    )
    if compiler is None or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    try:
        kept = _cache_folder() / f"{_digest(compiler)}.so"
        if not kept.exists():
            _compile(compiler, kept)
        return ctypes.CDLL(str(kept))
    except subprocess.CalledProcessError as error:
        log.warning("%s does not compile the kernels, torch's go on: %s",
                    compiler, error.stderr.strip()[-500:])  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("no compiled kernels, torch's go on: %s", error)
    return None


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors."""
    on_cpu = all(x.device.type == "cpu" and x.dtype is torch.float32 for x in tensors)
    return on_cpu and library() is not None


@lru_cache
def function(name: str, *arguments: type, returns: type | None = None) -> Callable[..., Any]:
    """One of the library's, with the C types of what it takes."""
    found: Callable[..., Any] = getattr(library(), name)
    found.argtypes, found.restype = arguments, returns  # type: ignore[attr-defined]
    return found


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) / "vlmflow" / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _sources() -> list[Path]:
    return sorted(Path(__file__).parent.glob("*.cpp"))


def _digest(compiler: str) -> str:
    """Of all that decides what the compiler makes of it; homes are shared by unlike machines."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    described = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    processor = [line for line in described if line.startswith(("model name", "flags"))]
    code = [path.read_bytes() for path in _sources()]
    parts = (*code, version, *map(str.encode, (*FLAGS, *processor)))
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _compile(compiler: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        subprocess.run([compiler, *FLAGS, "-o", made, *_sources()],
                       capture_output=True, text=True, check=True, timeout=TIMEOUT_S)  # fmt: skip
        made.replace(target)
