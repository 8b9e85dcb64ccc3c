"""What `--json` prints: one object on one line of stdout, for programs to read."""

from __future__ import annotations

import json
import sys
from typing import Any


def print_json(value: Any) -> None:
    """Prints it, and at once where a pipe waits for it."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()
