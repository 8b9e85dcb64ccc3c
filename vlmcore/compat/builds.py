"""Which build of a torch library is installed, read from its files: importing one takes seconds."""

from __future__ import annotations

import functools
import re
from importlib.machinery import PathFinder
from pathlib import Path


@functools.cache
def cuda_build_beside_cpu_torch(package: str) -> bool:
    """Whether `package` was built for CUDA while torch was not, so that its extension cannot load.

    The package registry has only the CUDA build of torchvision and its like, and pip takes that
    one also where it finds a CPU build of torch.
    """
    return _build_tag("torch") == "cpu" and _build_tag(package).startswith("cu")


def _build_tag(package: str) -> str:
    """`cpu` of a version 2.13.0+cpu; empty where there is none, or no such package."""
    spec = PathFinder.find_spec(package)
    if spec is None or not spec.origin:
        return ""
    version_file = Path(spec.origin).with_name("version.py")
    if not version_file.exists():
        return ""
    found = re.search(r"__version__ = '[^'+]*\+(\w+)", version_file.read_text(encoding="utf-8"))
    return found[1] if found else ""
