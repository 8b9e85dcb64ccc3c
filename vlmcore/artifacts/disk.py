"""Writing so that a crash leaves the old or the new, and saying plainly that a disk is full."""

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from vlmcore.artifacts.manifest import list_files

_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_atomic(path: Path, data: bytes, *, draft: Path) -> None:
    """Writes a file that is there whole or not at all, also after a power cut.

    `draft` is where it grows: on the same filesystem, and where a crash may leave it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with draft.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(path)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Makes renames inside `folder` last through a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def is_disk_full(error: BaseException) -> bool:
    """Whether the error, or one that it was raised from, means a full disk or quota.

    Also by its text: safetensors, torch and child processes wrap the system's error in their own.
    """
    return any(
        getattr(one, "errno", None) in _FULL or os.strerror(errno.ENOSPC) in str(one)
        for one in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def describe_space(folder: Path) -> str:
    """How much `folder` holds and how much its disk has left, in words."""
    used = sum((folder / path).lstat().st_size for path in list_files(folder))
    there = next(one for one in (folder, *folder.parents) if one.exists())
    return f"{_mb(used)} written, {_mb(shutil.disk_usage(there).free)} free"


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"
