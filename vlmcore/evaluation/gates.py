"""Gates: conditions of a recipe on its checkpoints' scores, `align.holdout.exact_match >= 0.3`."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlmcore.errors import GateError

OPERATORS = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
_NAME = r"[\w-]+"
_GATE = re.compile(
    rf"\s*(?:(?P<checkpoint>{_NAME})\.)?(?P<metric>{_NAME}\.{_NAME})"
    r"\s*(?P<op>>=|<=|==|>|<)\s*(?P<bound>\S+)\s*"
)


@dataclass(frozen=True)
class Gate:
    """`metric` is `benchmark.metric`; `checkpoint` None: the recipe's last one."""

    text: str
    checkpoint: str | None
    metric: str
    op: str
    bound: float


@dataclass(frozen=True)
class GateResult:
    """A gate, the score it was held against, and whether that passes."""

    gate: str
    value: float
    passed: bool


def parse_gate(text: str) -> Gate:
    """The gate that `[checkpoint.]benchmark.metric OP number` says.

    Raises:
        GateError: The text is no such condition.
    """
    match = _GATE.fullmatch(text)
    bound = _number(match["bound"]) if match else None
    if match is None or bound is None:
        raise GateError(
            f"gate {text!r} is not understood; expected [checkpoint.]benchmark.metric, one of "
            f"{' '.join(OPERATORS)}, and a number, such as 'holdout.exact_match >= 0.9'"
        )
    return Gate(text, match["checkpoint"], match["metric"], match["op"], bound)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None  # nothing is ever >= nan


def check_gates(
    gates: Sequence[str],
    scores: Mapping[str, Mapping[str, float]],
    *,
    default_checkpoint: str,
) -> list[GateResult]:
    """Each gate held against the scores.

    Args:
        gates: Conditions, as `parse_gate` takes them.
        scores: Checkpoint → `benchmark.metric` → value.
        default_checkpoint: The one that a gate without a checkpoint means.

    Raises:
        GateError: Lists the gates that name a checkpoint or a metric without a score.
    """
    results: list[GateResult] = []
    faults: list[str] = []
    for gate in map(parse_gate, gates):
        checkpoint = gate.checkpoint or default_checkpoint
        value = scores.get(checkpoint, {}).get(gate.metric)
        if value is None:
            faults.append(f"gate {gate.text!r}: there is no score {checkpoint}.{gate.metric}")
        else:
            results.append(GateResult(gate.text, value, OPERATORS[gate.op](value, gate.bound)))
    if faults:
        known = [f"{name}.{metric}" for name, found in scores.items() for metric in found]
        raise GateError("\n".join([*faults, f"scores that exist: {', '.join(known) or 'none'}"]))
    return results
