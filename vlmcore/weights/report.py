"""The ledger of a conversion, closed, and the report of it.

Workers count what they read and write as they do it; here the counts meet the plan.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vlmcore.errors import WeightError
from vlmcore.weights.journal import Done, Progress
from vlmcore.weights.plan import Plan
from vlmcore.weights.units import Task


def close_ledger(tasks: Sequence[Task], progress: Progress) -> None:
    """Holds what was done against the plan.

    Raises:
        WeightError: Lists every tensor that was not read or written exactly once and whole.
    """
    faults = []
    expected: Counter[str] = Counter()
    for task in tasks:
        expected.update({key: math.prod(info.shape) for key, info in task.tensors.items()})
        for region in task.unit.regions:
            expected[region.label] += math.prod(region.shape)
    times: Counter[str] = Counter()
    for done in progress.done.values():
        for name, (_, elements) in (*done.tensors.items(), *done.boxes.items()):
            times[name] += 1
            if elements != expected[name]:
                faults.append(f"{name}: {elements} of {expected[name]} elements")
    faults += [
        f"{name}: moved {times[name]} times, expected once"
        for name in sorted({*expected, *times})
        if times[name] != 1
    ]
    if faults:
        raise WeightError("the ledger does not close:\n  " + "\n  ".join(faults))


def conversion_report(
    family: str, plan: Plan, done: Sequence[Done], *, dequantized: Mapping[str, str]
) -> dict[str, Any]:
    """What a conversion did; the same for the same source and options, however it was run.

    Args:
        family: `model_type` of the family.
        plan: What was moved.
        done: What the journal says of each unit.
        dequantized: HF key → the scales that were consumed with it.
    """
    tensors = {key: digest for one in done for key, (digest, _) in one.tensors.items()}
    boxes = {label: digest for one in done for label, (digest, _) in one.boxes.items()}
    return {
        "family": family,
        "tied": dict(plan.tied),
        "dropped": dict(plan.dropped),
        "dequantized": dict(dequantized),
        "bytes": sum(one.size_bytes for one in done),
        "digest": total_digest(tensors),
        "tensors": dict(sorted(tensors.items())),
        "boxes": dict(sorted(boxes.items())),
    }


def total_digest(digests: Mapping[str, str]) -> str:
    """One digest of many tensors, by their names and digests."""
    joined = "".join(f"{key}:{digest}\n" for key, digest in sorted(digests.items()))
    return hashlib.sha256(joined.encode()).hexdigest()
