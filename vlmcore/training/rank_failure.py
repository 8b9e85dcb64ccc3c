"""Which rank brought a run down, from what torchrun and the ranks say when they die.

Where one rank dies, the others soon fail too: their collectives lose their partner. Nobody wants to
read of that first.
"""

from __future__ import annotations

import re
import signal
from collections import deque

TRACEBACK_LINES = 40
_MARKED = re.compile(r"\[rank(\d+)\]:")  # torch marks the traceback of a rank that dies
_RANK = re.compile(r"\s*rank\s*:\s*(\d+) \(local_rank: \d+\)")  # torchrun's table, a line each
_EXIT = re.compile(r"\s*exitcode\s*:\s*(-?\d+)")
# what gloo, NCCL and torch's store say where the other side is gone
_LOST_PEER = re.compile(
    r"closed by peer|reset by peer|Broken pipe|remote process exited|Connection refused"
    r"|Connection was likely closed|Timed out waiting|Watchdog caught|recvValue failed"
    r"|DistNetworkError|DistBackendError|DistStoreError"
)


class RankFailures:
    """Hears every line of a run."""

    def __init__(self) -> None:
        self._tracebacks: dict[int, deque[str]] = {}
        self._signals: dict[int, int] = {}
        self._rank: int | None = None  # whose row of the table is being read

    def hear(self, line: str) -> None:
        """Takes note of a line."""
        if found := _MARKED.match(line):
            rank = int(found[1])
            self._tracebacks.setdefault(rank, deque(maxlen=TRACEBACK_LINES)).append(line)
        elif found := _RANK.match(line):
            self._rank = int(found[1])
        elif (found := _EXIT.match(line)) and self._rank is not None:
            code = int(found[1])
            if code < 0 and -code != signal.SIGTERM:  # torchrun ends the others by SIGTERM
                self._signals[self._rank] = -code

    def cause(self) -> str | None:
        """What to show first: the rank that was killed, else the traceback that is no echo."""
        if self._signals:
            rank, number = min(self._signals.items())
            advice = "; if nobody sent it, the machine ran out of memory"
            name = signal.Signals(number).name
            return f"rank {rank} was killed by {name}{advice if name == 'SIGKILL' else ''}"
        texts = ["\n".join(lines) for lines in self._tracebacks.values()]
        own = [text for text in texts if not _LOST_PEER.search(text.splitlines()[-1])]
        return next(iter(own or texts), None)
