"""`path:LOCATION`: a folder of this machine, or one JSONL file and the images its rows name.

Files are copied: a later edit of the user's own file must not reach into a finished artifact.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.files import is_inside
from vlmcore.errors import DataError


def fetch(location: str, dest: Path, *, options: Mapping[str, Any], seed: int) -> None:
    """Copy the folder as it is; a single JSONL file becomes `train.jsonl`.

    Raises:
        DataError: nothing is there, or options were given.
    """
    if options:
        raise DataError(f"path:{location} has no options, found {', '.join(sorted(options))}.")
    for name, file in _files(location).items():
        target = dest / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def fingerprint(location: str) -> str:
    """sha256 over name, size and time of change of every file: bytes are not read."""
    digest = hashlib.sha256()
    for name, file in _files(location).items():
        stat = file.stat()
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _files(location: str) -> dict[str, Path]:
    """Name inside the dataset → file on this machine, sorted by name."""
    root = Path(location).expanduser()
    if root.is_dir():
        found = {file.relative_to(root).as_posix(): file for file in root.rglob("*")}
    elif root.is_file():
        found = {name: root.parent / name for name in _image_names(root)}
        found["train.jsonl"] = root
    else:
        raise DataError(f"data source 'path:{location}': nothing is there. Check the path.")
    return {name: found[name] for name in sorted(found) if found[name].is_file()}


def _image_names(table: Path) -> set[str]:
    """Every image that a row names. Rows that do not parse are left to whoever counts bad rows."""
    names: set[str] = set()
    with table.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            images = row.get("images") if isinstance(row, dict) else None
            if isinstance(images, list):
                names.update(name for name in images if isinstance(name, str) and is_inside(name))
    return names
