"""Remedies for libraries that cannot load here; nothing happens where the real ones load.

`install()` is for this process, `child_env()` for processes that it starts. Each remedy is one
module that names the condition under which it applies and what ends it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from vlmcore.compat import audio_absent, image_decoding, torchvision_ops

REMEDIES = (torchvision_ops, image_decoding, audio_absent)
SITE = Path(__file__).with_name("site")
NVIDIA_DRIVER = Path("/proc/driver/nvidia")


def install() -> None:
    """Apply what this environment needs; cheap, imports no library, may be called again."""
    for remedy in REMEDIES:
        if remedy.needed():
            remedy.install()
    if not NVIDIA_DRIVER.exists():  # deepspeed warns of it whenever something imports it
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def child_env(base_env: Mapping[str, str] | None = None) -> dict[str, str]:
    """`base_env` (None: ours) with what makes `install()` run first in every Python child."""
    env = dict(os.environ if base_env is None else base_env)
    if any(remedy.needed() for remedy in REMEDIES):
        others = [p for p in env.get("PYTHONPATH", "").split(os.pathsep) if p and p != str(SITE)]
        env["PYTHONPATH"] = os.pathsep.join([str(SITE), *others])
    return env
