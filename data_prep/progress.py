"""How far long work is: whoever works tells it, whoever waits shows it."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path

POLL_S = 0.5

Progress = Callable[[float, float, str], None]  # so much, of so much, of what


def quiet(done: float, total: float, text: str) -> None:
    """Progress that nobody waits for."""


@contextmanager
def watched(folder: Path, *, total_bytes: int, on_progress: Progress) -> Iterator[None]:
    """Tells, at each further percent, how much of what is being fetched lies in a folder.

    The folder is asked rather than those who fetch: parts of an earlier call count, and so does
    what a library fetches by itself.
    """
    ended = threading.Event()

    def watch() -> None:
        percent, pause_s = -1, POLL_S
        while not ended.wait(pause_s):
            began = time.monotonic()
            size = _size(folder)
            pause_s = max(POLL_S, 20 * (time.monotonic() - began))  # of many files: less often
            if 100 * size // total_bytes > percent:
                percent = 100 * size // total_bytes
                on_progress(size / 1e6, total_bytes / 1e6, "MB")

    if total_bytes == 0 or on_progress is quiet:
        yield
        return
    # in the caller's context: Prefect finds the run that progress belongs to there
    thread = threading.Thread(target=copy_context().run, args=(watch,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    on_progress(total_bytes / 1e6, total_bytes / 1e6, "MB")


def _size(folder: Path) -> int:
    size = 0
    for where, _, files in os.walk(folder):
        for file in files:
            try:
                size += Path(where, file).stat().st_size
            except FileNotFoundError:  # renamed since
                continue
    return size
