"""What a run says while it trains: marked JSON lines for its parent, one metrics line a step."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

_MARK = "@progress "
_ERROR = "@error "


def report_progress(**values: Any) -> None:
    """Writes one progress line to stdout."""
    sys.stdout.write(_MARK + json.dumps(values) + "\n")
    sys.stdout.flush()


def parse_progress(line: str) -> dict[str, Any] | None:
    """The values of a progress line; None for any other line."""
    if not line.startswith(_MARK):
        return None
    try:
        values: dict[str, Any] = json.loads(line.removeprefix(_MARK))
    except json.JSONDecodeError:  # two ranks wrote into one line
        return None
    return values


def report_error(message: str) -> None:
    """Writes an error that is the user's to mend, as one line."""
    sys.stdout.write(_ERROR + json.dumps(message) + "\n")
    sys.stdout.flush()


def parse_error(line: str) -> str | None:
    """The message of an error line; None for any other line."""
    if not line.startswith(_ERROR):
        return None
    try:
        return str(json.loads(line.removeprefix(_ERROR)))
    except json.JSONDecodeError:
        return line.removeprefix(_ERROR)


class MetricsFile:
    """One JSON line a step; what a killed run wrote past its last checkpoint is taken back."""

    def __init__(self, path: Path, *, after_step: int) -> None:
        lines = path.read_text().splitlines() if path.is_file() else []
        kept = [line for line in lines if _step_of(line) <= after_step]
        path.write_text("".join(f"{line}\n" for line in kept))
        self._file = path.open("a", buffering=1)

    def write(self, values: dict[str, Any]) -> None:
        """Appends a step."""
        self._file.write(json.dumps(values) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except json.JSONDecodeError:  # the line that a kill cut off
        return math.inf
