"""Room in the folder of encoded samples: when a stage begins, what was longest unused goes.

Without torch, for the process that starts the ranks. Nothing is locked: others may read, write and
remove at the same time, or be killed; a removed entry is one that is made anew.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

# An entry's time of use is its mtime, which is written at most so often: reading an entry again
# and again costs no writes.
USED_AGAIN_S = 24 * 3600


def mark_used(path: Path) -> None:
    """Notes that an entry was read; where that cannot be written, its place in line is older."""
    with contextlib.suppress(OSError):
        if time.time() - path.stat().st_mtime > USED_AGAIN_S:
            os.utime(path)


def make_room(folder: Path, max_bytes: int) -> int:
    """Removes the longest unused entries until what is left fits.

    Args:
        folder: Of an `EncodedCache`; need not be there.
        max_bytes: What the entries may take together.

    Returns:
        Bytes that were removed.
    """
    entries = sorted(_entries(folder))
    excess = sum(size for _, size, _ in entries) - max_bytes
    removed = 0
    for _, size, path in entries:
        if removed >= excess:
            break
        Path(path).unlink(missing_ok=True)  # another process may have done it
        removed += size
    return removed


def _entries(folder: Path) -> Iterator[tuple[float, int, str]]:
    """Time of use, bytes and path of every entry; drafts stand elsewhere."""
    for shelf in folder.glob("??"):
        with contextlib.suppress(FileNotFoundError), os.scandir(shelf) as found:
            for entry in found:
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_file():
                        stat = entry.stat()
                        yield stat.st_mtime, stat.st_size, entry.path
