"""torchaudio and torchcodec taken as not installed where they cannot load.

Their import dies on a missing CUDA library, with an OSError or RuntimeError that transformers and
vLLM do not catch; both do without the packages when these are absent.

Condition: a CUDA build of the package beside a CPU build of torch. Ends when the builds match, or
when audio is served on such a machine (then a CPU build has to be installed).
"""

from __future__ import annotations

import sys

from vlmcore.compat.builds import cuda_build_beside_cpu_torch

PACKAGES = ("torchaudio", "torchcodec")


def needed() -> bool:
    """Whether one of the packages is installed and cannot load."""
    return any(map(cuda_build_beside_cpu_torch, PACKAGES))


def install() -> None:
    """Hide those that cannot load from imports and from `importlib.util.find_spec`."""
    for package in filter(cuda_build_beside_cpu_torch, PACKAGES):
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]
