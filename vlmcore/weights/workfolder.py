"""The folder in which a conversion grows beside its target, and the one rename that publishes it.

It survives an interruption, and the next conversion of the same source with the same options goes
on in it.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlmcore.errors import WeightError
from vlmcore.weights.journal import Journal
from vlmcore.weights.workers import explain

log = logging.getLogger(__name__)

JOURNAL = "journal.jsonl"
SYNC_PAUSE_S = 0.2


class WorkFolder:
    """Where a conversion writes.

    Attributes:
        path: The folder.
        journal: What has been done in it.
    """

    def __init__(self, path: Path, target: Path, journal: Journal, files: Iterable[str]) -> None:
        self.path = path
        self.journal = journal
        self._target = target
        self._files = [path / name for name in files]

    @contextmanager
    def syncing(self) -> Iterator[None]:
        """Lets the disk write all the while, so that little is left to wait for at the end."""
        ended = threading.Event()

        def sync() -> None:
            while not ended.wait(SYNC_PAUSE_S):
                for path in self._files:
                    _sync(path)

        thread = threading.Thread(target=sync, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def discard(self) -> None:
        """Removes it: nothing in it is worth going on from."""
        shutil.rmtree(self.path)

    def publish(self) -> None:
        """Makes it the target, once everything in it has reached the disk."""
        for path in [*self.path.rglob("*"), self.path]:
            _sync(path)
        (self.path / JOURNAL).unlink()
        self.path.replace(self._target)
        _sync(self._target.parent)


@contextmanager
def work_folder(
    target: Path, *, identity: Mapping[str, Any], files: Mapping[str, int]
) -> Iterator[WorkFolder]:
    """The work folder of a target, with its files at their final sizes.

    Args:
        target: Must not be there, or be an empty folder.
        identity: What the conversion is; the journal of another one is not continued.
        files: Path inside the folder → size.

    Raises:
        WeightError: The target is there, another conversion writes it, or the disk is full.
    """
    require_free(target)
    path = target.with_name(f"{target.name}.partial")
    if path.exists() and any(path.iterdir()) and not (path / JOURNAL).is_file():
        raise WeightError(f"{path} is no conversion's work folder, which it must be; remove it")
    try:
        path.mkdir(parents=True, exist_ok=True)
        journal = Journal(path / JOURNAL, identity)
        if journal.discarded:
            log.warning("%s: left by another conversion; starting anew", path)
        try:
            _make_files(path, files, keep=bool(journal.progress.done))
            yield WorkFolder(path, target, journal, files)
        finally:
            journal.close()
    except OSError as error:
        raise WeightError(f"{path}: {explain(error)}") from error


def require_free(target: Path) -> None:
    """Nothing is ever written over.

    Raises:
        WeightError: There is something at the target.
    """
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists():
        raise WeightError(f"{target} is already there; remove it or choose another target")


def _make_files(folder: Path, files: Mapping[str, int], *, keep: bool) -> None:
    """Files of their final size; whatever else stands there is of no use any more."""
    for path in list(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != JOURNAL and not (keep and name in files):
            path.unlink()
    allocated = sum((folder / name).stat().st_blocks * 512 for name in files
                    if (folder / name).exists())  # fmt: skip
    needed = sum(files.values()) - allocated
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise WeightError(
            f"{folder}: the disk is full: {needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB "
            "free; make room and run the same command again"
        )
    for name, size in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("ab") as file:
            file.truncate(size)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
