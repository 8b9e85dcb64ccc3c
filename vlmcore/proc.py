"""Child processes that stream their output, end with their cause, and never stay behind.

Every child runs under `vlmcore/leash.py`, in a session of its own. Whatever happens here, an
exception, a cancelled flow, a kill -9, the child and all that it started are stopped.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vlmcore.errors import ProcessError

log = logging.getLogger(__name__)

LEASH = Path(__file__).with_name("leash.py")
TAIL_LINES = 40
TAIL_BYTES = 16_384
LEASH_MARGIN_S = 10.0  # for the leash to SIGKILL and reap after the grace

Command = Sequence[str | os.PathLike[str]]

_live: set[subprocess.Popen[Any]] = set()
_live_lock = threading.Lock()


class ChildFailedError(ProcessError):
    """A child ended with `exit_code` ≠ 0 (128 + n: killed by signal n); `tail`: its last lines."""

    def __init__(self, message: str, *, exit_code: int, tail: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.tail = tail


@dataclass(frozen=True)
class Child:
    """A running child process whose output goes to `log_path`."""

    popen: subprocess.Popen[bytes]
    log_path: Path

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self.popen.poll()

    def tail(self) -> str:
        """The last lines that it wrote."""
        with self.log_path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-TAIL_LINES:])


def run_logged(
    cmd: Command,
    *,
    log_path: Path | None = None,
    on_line: Callable[[str], None] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    grace_s: float = 20.0,
) -> None:
    """Run `cmd` to its end, handing each line of its merged output to `on_line` as it comes.

    Args:
        cmd: Program and arguments.
        log_path: File that also gets every line, appended.
        on_line: Called with each line, without its newline; by default it is logged.
        env: Environment of the child; None: ours.
        grace_s: Seconds between SIGTERM and SIGKILL when the child must stop before its end.

    Raises:
        ChildFailedError: It ended with a code other than 0.
    """
    on_line = on_line or (lambda line: log.info("%s", line))
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    with ExitStack() as stack:
        file = None
        if log_path is not None:
            file = stack.enter_context(log_path.open("a", encoding="utf-8"))
        popen = stack.enter_context(
            _leashed(cmd, stdout=subprocess.PIPE, env=env, cwd=cwd, grace_s=grace_s)
        )
        for line in _lines(popen):
            tail.append(line)
            if file:
                file.write(line + "\n")
                file.flush()
            on_line(line)
        exit_code = popen.wait()
    if exit_code:
        raise failure(cmd, exit_code=exit_code, tail="\n".join(tail), log_path=log_path)


@contextmanager
def child(
    cmd: Command,
    *,
    log_path: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    grace_s: float = 5.0,
) -> Iterator[Child]:
    """A server for the length of a `with` block; its output is appended to `log_path`."""
    with (
        log_path.open("ab") as file,
        _leashed(cmd, stdout=file, env=env, cwd=cwd, grace_s=grace_s) as popen,
    ):
        yield Child(popen, log_path)


@contextmanager
def reap() -> Iterator[None]:
    """Put around a flow body: an exception that leaves it stops the children of all threads.

    A cancellation reaches only the main thread, while a stage submitted to a thread goes on
    waiting for its child, and the interpreter for the thread. Children from before the block stay,
    such as the Prefect server that has yet to be told how the flow ended.
    """
    with _live_lock:
        before = set(_live)
    try:
        yield
    except BaseException:
        with _live_lock:
            orphans = _live - before
        for popen in orphans:
            popen.terminate()  # the waiting thread sees its child end and reports that
        raise


def free_port(host: str = "127.0.0.1") -> int:
    """A port of `host` that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def port_holder(host: str, port: int) -> str | None:
    """Who keeps us from listening on a port, for an error message; None when it is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return f"{error.strerror}; {_listener(port)} answers there"
    return None


def reachable(host: str) -> str:
    """An address at which a server that listens on `host` can be asked from here."""
    return "127.0.0.1" if host in ("", "0.0.0.0") else host


def failure(
    cmd: Command, *, exit_code: int, tail: str, log_path: Path | None = None
) -> ChildFailedError:
    """The error for a child that ended with `exit_code`, ready to raise."""
    where = f" (whole output: {log_path})" if log_path else ""
    message = f"{Path(cmd[0]).name} ended with {_cause(exit_code)}{where}; its last lines:\n{tail}"
    return ChildFailedError(message, exit_code=exit_code, tail=tail)


def _listener(port: int) -> str:
    import psutil

    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
            if connection.pid is None:
                break
            program = " ".join(psutil.Process(connection.pid).cmdline())
            return f"process {connection.pid} (`{program[:120]}`)"
    return "a process of another user"


def _cause(exit_code: int) -> str:
    signum = exit_code - 128
    if signum == signal.SIGKILL:
        return "SIGKILL; if nobody sent it, the machine ran out of memory"
    if signum in set(signal.Signals):
        return signal.Signals(signum).name
    return f"exit code {exit_code}"


@contextmanager
def _leashed(
    cmd: Command,
    *,
    stdout: int | IO[bytes],
    env: Mapping[str, str] | None,
    cwd: Path | None,
    grace_s: float,
) -> Iterator[subprocess.Popen[bytes]]:
    leash = [sys.executable, "-I", "-S", str(LEASH), str(os.getpid()), str(grace_s)]
    popen = subprocess.Popen(
        leash + [os.fspath(part) for part in cmd],
        # a Python child would keep its lines back: its output is no terminal
        env={**(os.environ if env is None else env), "PYTHONUNBUFFERED": "1"},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    with _live_lock:
        _live.add(popen)
    try:
        yield popen
    finally:
        _stop(popen, grace_s=grace_s)
        if popen.stdout:
            popen.stdout.close()
        with _live_lock:
            _live.discard(popen)


def _stop(popen: subprocess.Popen[bytes], *, grace_s: float) -> None:
    popen.terminate()
    try:
        popen.wait(timeout=grace_s + LEASH_MARGIN_S)
    except subprocess.TimeoutExpired:
        log.warning("process %d does not end by itself: killed", popen.pid)
        popen.kill()
        popen.wait()


def _lines(popen: subprocess.Popen[bytes]) -> Iterator[str]:
    """Lines as they come; a progress bar's carriage return ends a line too."""
    assert popen.stdout is not None
    with io.TextIOWrapper(popen.stdout, encoding="utf-8", errors="replace") as text:
        for line in text:
            yield line.rstrip("\n")
