"""One process at a time, by a kernel lock that ends with its holder, kill -9 included."""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from vlmcore.errors import ArtifactError

log = logging.getLogger(__name__)

_POLL_S = 0.1
_held: set[int] = set()


@contextmanager
def hold_lock(path: Path, *, what: str) -> Iterator[None]:
    """Holds the lock file `path` for the block; waits as long as another process or thread has it.

    Waiting is logged once, with `what` and the holder. The file stays: only the kernel's lock
    on it counts, so nothing has to be cleared after a crash.

    Raises:
        ArtifactError: the lock cannot be had here (read-only, or a filesystem without flock).
    """
    fd = _open(path, what=what)
    _held.add(fd)
    try:
        _acquire(fd, path, what=what)
        _sign(fd)
        yield
    finally:
        if fd in _held:  # not in a forked child, which has given it up already
            _held.remove(fd)
            os.close(fd)


def _open(path: Path, *, what: str) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise ArtifactError(
            f"{what}: cannot be built in this store, {path} is not writable ({error.strerror}). "
            "Make the store writable or choose another one."
        ) from error


def _acquire(fd: int, path: Path, *, what: str) -> None:
    told = False
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not told:
                log.info("%s: waiting for %s", what, _holder(fd))
                told = True
            # polled, since a thread that sleeps in flock cannot be cancelled
            time.sleep(_POLL_S)
        except OSError as error:
            raise ArtifactError(
                f"{what}: {path} cannot be locked ({error.strerror}). The store's filesystem must "
                "support flock (Lustre: mount with -o flock)."
            ) from error


def _sign(fd: int) -> None:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    note = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps(note).encode(), 0)


def _holder(fd: int) -> str:
    try:
        note = json.loads(os.pread(fd, 4096, 0))
    except ValueError:  # between its truncate and its write
        return "another process"
    return f"process {note['pid']} on {note['host']}, at it since {note['since']}"


def _give_up_in_child() -> None:
    # A forked worker shares its parent's lock and would keep it when only the parent is killed.
    for fd in _held:
        os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_give_up_in_child)
