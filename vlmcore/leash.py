"""The small process between us and a child, so that nothing outlives its owner.

`python leash.py OWNER_PID GRACE_S COMMAND…` starts the command, waits for it, and exits with its
code. It stands apart because no other process could do this: it survives a kill -9 of the owner,
and as the subreaper it inherits every orphan below it, whatever session that orphan moved to
(torchrun's ranks and vLLM's engines live in sessions of their own). When the owner is gone, or a
SIGTERM comes, or the command has ended, whatever still runs gets a SIGTERM, `GRACE_S` seconds, and
a SIGKILL. On a system other than Linux only the command's own process group is reached.

Run as a file under `-I -S`: it imports nothing but the standard library and starts in about 40 ms.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LIBC = ctypes.CDLL(None)  # loaded before any fork: the child must not load it
POLL_S = 0.05
COMMAND_NOT_STARTED = 127  # what a shell answers for a command that it cannot start


def prctl(option: int, value: int) -> None:
    """Set a process attribute where the kernel knows it (Linux)."""
    if sys.platform == "linux":
        LIBC.prctl(option, value, 0, 0, 0)


class Leash:
    """One command, its descendants, and the wish to stop them."""

    def __init__(self, cmd: list[str], *, owner_pid: int, grace_s: float) -> None:
        self.owner_pid = owner_pid
        self.grace_s = grace_s
        self.stopping = False
        self.exit_code: int | None = None
        signal.signal(signal.SIGTERM, self._on_sigterm)
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        # a session of its own: its group can be signalled without signalling ourselves; should we
        # be killed ourselves, the kernel tells the command, and the command its children
        self.child = subprocess.Popen(
            cmd,
            start_new_session=True,
            preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
        )

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        self.stopping = True

    def run(self) -> int:
        """Wait for the command or for a reason to stop it; leave no descendant; its exit code."""
        while self.exit_code is None and not self.stopping:
            self._collect()
            self.stopping |= os.getppid() != self.owner_pid
            time.sleep(POLL_S)
        self._signal_all(signal.SIGTERM)
        deadline = time.monotonic() + self.grace_s
        while self._collect():
            if time.monotonic() > deadline:
                # children of a killed child become ours, so this ends when none is left
                self._signal_all(signal.SIGKILL)
            time.sleep(POLL_S)
        return 128 + signal.SIGKILL if self.exit_code is None else self.exit_code

    def _collect(self) -> bool:
        """Reap what has ended; false once no child is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self.child.pid:
                code = os.waitstatus_to_exitcode(status)
                self.exit_code = code if code >= 0 else 128 - code

    def _signal_all(self, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.child.pid, signum)
        for pid in _children():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signum)


def _children() -> list[int]:
    """Direct children of this process, orphans that it inherited among them."""
    listing = Path(f"/proc/self/task/{os.getpid()}/children")
    return [int(pid) for pid in listing.read_text().split()] if listing.exists() else []


def main(argv: list[str]) -> int:
    """Run the command line given above."""
    owner_pid, grace_s, *cmd = argv
    try:
        leash = Leash(cmd, owner_pid=int(owner_pid), grace_s=float(grace_s))
    except OSError as error:
        sys.stderr.write(f"{cmd[0]}: {error.strerror}\n")
        return COMMAND_NOT_STARTED
    return leash.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
