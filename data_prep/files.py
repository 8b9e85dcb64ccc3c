"""The few things that several steps do with files."""

import os
import shutil
from pathlib import Path


def is_inside(name: str) -> bool:
    """Whether the relative path `name` stays inside the folder that it is relative to."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return bool(parts) and name[0] != "/" and ".." not in parts and "\0" not in name


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy of it where links cannot reach."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
