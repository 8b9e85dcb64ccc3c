"""Gate expressions of a recipe: `[checkpoint.]benchmark.metric >= value`, parsed, never evaluated.

They are read here, not where scores are known, so that a mistyped gate stops a run at its first
second and not after the training.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, cast

Comparison = Literal[">=", "<=", ">", "<", "=="]

_GATE = re.compile(r"(?P<score>.*?)\s*(?P<op>[<>=!]+)\s*(?P<value>.*)", re.DOTALL)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_OPS = (">=", "<=", ">", "<", "==")


@dataclass(frozen=True, slots=True)
class Gate:
    """One condition on a score; no checkpoint means the last one that the benchmark scores."""

    checkpoint: str | None
    benchmark: str
    metric: str
    op: Comparison
    value: float


def parse_gate(text: str) -> Gate:
    """The gate that `text` spells.

    Raises:
        ValueError: a sentence saying which part of the text is not understood.
    """
    match = _GATE.fullmatch(text.strip())
    if match is None or match["op"] not in _OPS:
        found = "no comparison" if match is None else f"comparison {match['op']!r}"
        raise ValueError(
            f"gate {text!r} has {found}; expected one of {' '.join(_OPS)}, "
            "as in `holdout.exact_match >= 0.9`"
        )
    names = match["score"].split(".")
    if len(names) not in (2, 3) or not all(_NAME.fullmatch(name) for name in names):
        raise ValueError(
            f"gate {text!r} compares {match['score']!r}; expected benchmark.metric or "
            "checkpoint.benchmark.metric"
        )
    try:
        value = float(match["value"])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(
            f"gate {text!r} compares with {match['value']!r}; expected a number such as 0.9"
        )
    *checkpoint, benchmark, metric = names
    op = cast(Comparison, match["op"])
    return Gate(checkpoint[0] if checkpoint else None, benchmark, metric, op, value)
