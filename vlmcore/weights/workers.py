"""Processes that move the units of a conversion: `python -m vlmcore.weights.workers`.

Each is a fresh interpreter that loads numpy but not torch: it starts in 0.2 s, holds 20 MB, and is
safe to start from a process with threads. All of them take unit numbers from one file at one shared
read position, so none waits while another has work, and append what they did to the journal, which
is the only way back. They end when the process that started them does, however that ends.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import pickle
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from vlmcore.errors import WeightError
from vlmcore.weights.journal import Done, Journal, boot_id, note_begun, note_done
from vlmcore.weights.units import Mover, Task

BYTES_PER_PROCESS = 64 << 20  # less is moved before another interpreter has started
POLL_S = 0.05
_NUMBER = struct.Struct("<I")
_USER_ERROR = 3  # exit code of a worker whose last words are for the user

Listener = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class Job:
    """What every worker gets.

    Attributes:
        folder: What files to be written are relative to.
        tasks: The units by number.
        unsure: Units that the journal says were done before the machine was started again.
    """

    folder: Path
    tasks: Mapping[int, Task]
    unsure: Mapping[int, Done]


def move_units(
    folder: Path,
    tasks: Sequence[Task],
    *,
    journal: Journal,
    num_processes: int | None,
    check: Callable[[], None],
    on_progress: Listener | None,
) -> None:
    """Moves every unit that the journal does not have, while `check` judges the source.

    Args:
        folder: What files to be written are relative to.
        tasks: All units of the conversion.
        journal: Of the conversion; gets a line per unit.
        num_processes: Worker processes; None: one a core, 8 at most, as far as there is work for
            them. With 1 the work is done in this process, after the check.
        check: Raises if the source must not be converted.
        on_progress: Hears how many bytes are done.

    Raises:
        WeightError: A unit could not be moved, or a worker died. The journal keeps what was done.
    """
    unsure = {n: d for n, d in journal.progress.done.items() if d.boot != boot_id()}
    left = [t for t in tasks if t.number not in journal.progress.done or t.number in unsure]
    left = _in_turns(left)
    job = Job(folder, {task.number: task for task in left}, unsure)
    num_bytes = sum(task.size_bytes for task in left)
    if num_processes is None:
        num_processes = min(os.cpu_count() or 1, 8, 1 + num_bytes // BYTES_PER_PROCESS)
    total = sum(task.size_bytes for task in tasks)

    def tell() -> None:
        done = journal.poll().done
        if on_progress is not None:
            on_progress(sum(one.size_bytes for one in done.values()), total)

    with _queue(left) as queue:
        if num_processes == 1 or not left:
            check()
            with contextlib.closing(_work(job, queue, journal.fd)) as done:
                for _ in done:
                    tell()
        else:
            _work_apart(job, queue, journal, num_processes, check, tell)
    tell()


def _in_turns(tasks: Sequence[Task]) -> list[Task]:
    """The large ones first, so that all workers end together, and one after the other in different
    files: two that write into one file wait for each other."""
    by_file: dict[Path, list[Task]] = defaultdict(list)
    for task in sorted(tasks, key=lambda task: -task.size_bytes):
        by_file[task.file].append(task)
    turns: list[tuple[float, int, Task]] = []
    for own in by_file.values():
        *before, total = itertools.accumulate((task.size_bytes for task in own), initial=0)
        turns += [
            (start / max(total, 1), task.number, task)
            for start, task in zip(before, own, strict=True)
        ]
    return [task for *_, task in sorted(turns)]


@contextmanager
def _queue(tasks: Sequence[Task]) -> Iterator[int]:
    """A file of unit numbers; whoever reads next, in whatever process, gets the next one."""
    with tempfile.TemporaryFile() as file:
        file.write(b"".join(_NUMBER.pack(task.number) for task in tasks))
        file.flush()
        file.seek(0)
        yield file.fileno()


def _work(job: Job, queue: int, journal: int) -> Generator[Done, None, None]:
    """Moves units until none is left."""
    with contextlib.closing(Mover(job.folder)) as mover:
        while taken := os.read(queue, _NUMBER.size):
            task = job.tasks[_NUMBER.unpack(taken)[0]]
            try:
                note_begun(journal, task.number)
                done = _move(mover, task, job.unsure.get(task.number))
                note_done(journal, done)
            except OSError as error:
                raise WeightError(f"{_what(task)}: {explain(error)}") from error
            yield done


def _move(mover: Mover, task: Task, earlier: Done | None) -> Done:
    """Moves one unit, unless what was done of it earlier is there."""
    if earlier is not None and mover.holds(task, earlier):
        return replace(earlier, boot=boot_id())
    return mover.move(task)


def explain(error: OSError) -> str:
    """What a failed write means, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"the disk is full ({error.strerror}); make room and run the same command again, it "
            "continues where it stopped"
        )
    return f"{error}; run the same command again, it continues where it stopped"


def _what(task: Task) -> str:
    names = list(task.unit.hf_keys)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# -- the side of the process that starts them ------------------------------------------------------


def _work_apart(
    job: Job,
    queue: int,
    journal: Journal,
    num_processes: int,
    check: Callable[[], None],
    tell: Callable[[], None],
) -> None:
    checked = _Checking(check)
    workers: list[_Worker] = []
    try:
        workers += [_Worker(queue, journal.fd) for _ in range(num_processes)]
        pickled = pickle.dumps(job)
        for worker in workers:
            worker.take(pickled)
        checked.start()
        while any(worker.runs(journal, job) for worker in workers) or checked.is_alive():
            checked.raise_fault()
            tell()
            time.sleep(POLL_S)
        checked.raise_fault()
    finally:
        for worker in workers:
            worker.end()


class _Checking(threading.Thread):
    """Runs the check beside the workers: it spends seconds on importing transformers."""

    def __init__(self, check: Callable[[], None]) -> None:
        super().__init__(daemon=True)  # nothing to wait for when the work has failed
        self._check = check
        self._fault: BaseException | None = None

    def run(self) -> None:
        try:
            self._check()
        except BaseException as error:  # noqa: BLE001 - raised again by `raise_fault`
            self._fault = error

    def raise_fault(self) -> None:
        if self._fault is not None:
            raise self._fault


class _Worker:
    """One worker process."""

    def __init__(self, queue: int, journal: int) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(queue), str(journal)],
            stdin=subprocess.PIPE,
            stderr=self._errors,
            pass_fds=(queue, journal),
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # threads that would have no work
        )

    def take(self, job: bytes) -> None:
        """Hands it the pickled job."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `runs` says what it died of
            self._process.stdin.write(job)
            self._process.stdin.flush()  # and kept open: its end tells the worker we are gone

    def runs(self, journal: Journal, job: Job) -> bool:
        """Whether it is still at work.

        Raises:
            WeightError: It failed or died.
        """
        code = self._process.poll()
        if not code:
            return code is None
        self._errors.seek(0)
        words = self._errors.read().decode(errors="replace").strip()
        if code == _USER_ERROR:
            raise WeightError(words)
        unit = journal.poll().begun.get(self._process.pid)
        at = "before its first tensor" if unit is None else f"at {_what(job.tasks[unit])}"
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise WeightError(
            f"a worker died ({cause}) {at}; run the same command again, it continues where it "
            f"stopped{f':{os.linesep}{words}' if words else ''}"
        )

    def end(self) -> None:
        """Ends it if it still runs."""
        self._process.kill()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._errors.close()


# -- the side of a worker --------------------------------------------------------------------------


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # nothing more is ever sent
    os._exit(1)


def main() -> None:
    """Works until the queue is empty; arguments: descriptors of the queue and the journal."""
    queue, journal = map(int, sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches us through the parent
    job: Job = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        for _ in _work(job, queue, journal):
            pass
    except WeightError as error:
        sys.stderr.write(str(error))
        sys.exit(_USER_ERROR)


if __name__ == "__main__":
    main()
