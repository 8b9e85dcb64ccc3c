"""Gates: conditions of a recipe held against its checkpoints' scores."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlmcore.errors import GateError
from vlmcore.recipe.gates import parse_gate

OPERATORS = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True)
class GateResult:
    """A gate, the score it was held against, and whether that passes."""

    gate: str
    value: float
    passed: bool


def check_gates(
    gates: Sequence[str],
    scores: Mapping[str, Mapping[str, float]],
    *,
    default_checkpoints: Mapping[str, str],
) -> list[GateResult]:
    """Each gate held against the scores.

    Args:
        gates: Conditions, as `parse_gate` takes them.
        scores: Checkpoint → `benchmark.metric` → value.
        default_checkpoints: Benchmark → the checkpoint that a gate without one means.

    Raises:
        GateError: Lists the gates that name a checkpoint or a metric without a score.
    """
    results: list[GateResult] = []
    faults: list[str] = []
    for text in gates:
        gate = parse_gate(text)
        checkpoint = gate.checkpoint or default_checkpoints.get(gate.benchmark, "")
        metric = f"{gate.benchmark}.{gate.metric}"
        value = scores.get(checkpoint, {}).get(metric)
        if value is None:
            faults.append(f"gate {text!r}: there is no score {checkpoint}.{metric}")
        else:
            results.append(GateResult(text, value, OPERATORS[gate.op](value, gate.value)))
    if faults:
        known = [f"{name}.{metric}" for name, found in scores.items() for metric in found]
        raise GateError("\n".join([*faults, f"scores that exist: {', '.join(known) or 'none'}"]))
    return results
