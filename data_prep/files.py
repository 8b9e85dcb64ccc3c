"""The few things that several steps do with files."""

import os
import shutil
from pathlib import Path, PurePosixPath


def is_inside(name: str) -> bool:
    """Whether the relative path `name` stays inside the folder that it is relative to."""
    path = PurePosixPath(name)
    return (
        bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name
    )


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy of it where links cannot reach."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
