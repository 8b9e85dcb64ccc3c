"""A `map` over processes that keeps the order and ends with the process it works for."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess

from vlmcore.errors import DataError


@contextmanager
def mapper(num_workers: int) -> Iterator[Callable]:
    """A `map` over so many processes, or in this one.

    Raises:
        DataError: a process was killed.
    """
    if num_workers == 1:
        yield map
        return
    # spawn: a fork of a process that already has threads (Prefect's) may hang
    with ProcessPoolExecutor(
        num_workers, mp_context=get_context("spawn"), initializer=_end_with_parent
    ) as pool:
        try:
            yield pool.map
        except BrokenProcessPool as error:
            raise DataError(
                "a process that wrote shards died, as when memory runs out. Run again with fewer "
                "workers: whole shards are kept."
            ) from error


def _end_with_parent() -> None:
    """Without this, a pool's processes wait for work for ever once their parent is killed -9."""

    def watch(parent: BaseProcess) -> None:
        parent.join()
        os._exit(1)

    parent = parent_process()
    assert parent is not None, "only for the processes of a pool"
    threading.Thread(target=watch, args=(parent,), daemon=True).start()
