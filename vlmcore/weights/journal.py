"""What a conversion has done so far, so that an interrupted one continues.

One JSON object a line: first what the conversion is, then, for each unit of work, that it was begun
and that it is done, with the digests of both sides. Several processes append; a line is one write.

A line says that bytes were handed to the system, not that they reached the disk: syncing after
every tensor would cost more than the conversion. A killed process loses nothing of that, a power
cut may. So each line names the boot of the machine that wrote it, and what another boot wrote is
read back and compared with its digests before it is trusted.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmcore.errors import WeightError

LOCK_TIMEOUT_S = 10.0  # workers of a killed conversion end within a second


@dataclass(frozen=True)
class Done:
    """A finished unit.

    Attributes:
        unit: Its number in the plan.
        tensors: HF key → (sha256, elements) of what was read or written.
        boxes: Label of a Megatron box → (sha256, elements) of what was written or read.
        size_bytes: Bytes written.
        boot: Boot of the machine that wrote them.
    """

    unit: int
    tensors: Mapping[str, tuple[str, int]]
    boxes: Mapping[str, tuple[str, int]]
    size_bytes: int
    boot: str = field(default_factory=lambda: boot_id())


@dataclass
class Progress:
    """What a journal tells.

    Attributes:
        done: Finished units by number; the last line about a unit counts.
        begun: Units begun and not finished, by the process that was at them.
    """

    done: dict[int, Done] = field(default_factory=dict)
    begun: dict[int, int] = field(default_factory=dict)

    def take(self, line: bytes) -> None:
        """Learns from one line.

        Raises:
            ValueError: The line was not written whole.
        """
        entry = json.loads(line)
        if "done" in entry:
            fields = entry["done"]
            for side in ("tensors", "boxes"):
                fields[side] = {name: tuple(found) for name, found in fields[side].items()}
            done = Done(**fields)
            self.done[done.unit] = done
            self.begun = {pid: unit for pid, unit in self.begun.items() if unit != done.unit}
        elif "begun" in entry:
            self.begun[entry["process"]] = entry["begun"]


class Journal:
    """The journal of one work folder, locked against a second conversion into it.

    Args:
        path: The file; created where it is not there.
        identity: What the conversion is: source, options, plan. JSON values.

    Attributes:
        fd: Open for appending; workers inherit it, and with it the lock.
        progress: What has been done, kept up to date by `poll`.
        discarded: True where a journal of another conversion was found and started anew.

    Raises:
        WeightError: Another process converts into this folder.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.progress = Progress()
        self.discarded = False
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._position = 0
        self._lock()
        first = _line({"conversion": identity})
        found = path.read_bytes()
        if found.startswith(first):
            self._position = len(first)
            self.poll()
            self.progress.begun.clear()  # by processes that are gone
            os.ftruncate(self.fd, self._position)  # a line that was not written whole
        else:
            self.discarded = bool(found)
            os.ftruncate(self.fd, 0)
            _append(self.fd, first)
            self._position = len(first)

    def close(self) -> None:
        """Gives the lock back once no worker holds it."""
        os.close(self.fd)

    def poll(self) -> Progress:
        """Reads what was appended since the last time."""
        with self.path.open("rb") as stream:
            stream.seek(self._position)
            for line in stream:
                if not line.endswith(b"\n"):
                    break
                try:
                    self.progress.take(line)
                except (ValueError, KeyError, TypeError):
                    break  # torn by a power cut; nothing after it is trusted
                self._position += len(line)
        return self.progress

    def _lock(self) -> None:
        end = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    os.close(self.fd)
                    raise WeightError(
                        f"{self.path.parent}: another conversion is writing there; let it end"
                    ) from None
                time.sleep(0.1)
            else:
                return


def note_begun(fd: int, unit: int) -> None:
    """Notes that this process is at a unit now."""
    _append(fd, _line({"begun": unit, "process": os.getpid()}))


def note_done(fd: int, done: Done) -> None:
    """Notes that a unit is finished."""
    _append(fd, _line({"done": vars(done)}))


def _append(fd: int, line: bytes) -> None:
    if os.write(fd, line) < len(line):  # the disk took a part of it
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def boot_id() -> str:
    """Changes with every start of the machine; random where the system has none."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else os.urandom(8).hex()


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"
