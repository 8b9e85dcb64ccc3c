import pytest

from vlmcore.errors import GateError
from vlmcore.evaluation.gates import check_gates

SCORES = {"align": {"holdout.exact_match": 0.5}, "full": {"holdout.exact_match": 0.95}}


def test_a_gate_without_a_checkpoint_means_the_default_one() -> None:
    results = check_gates(
        ["holdout.exact_match >= 0.9", "align.holdout.exact_match >= 0.9"],
        SCORES,
        default_checkpoints={"holdout": "full", "x": "full"},
    )
    assert [(r.value, r.passed) for r in results] == [(0.95, True), (0.5, False)]


@pytest.mark.parametrize(
    ("condition", "passed"),
    [
        (">= 0.5", True),
        ("> 0.5", False),
        ("<= 0.5", True),
        ("< 0.5", False),
        ("== 0.5", True),
        ("== 5e-1", True),
        (">0.49", True),
    ],
)
def test_each_operator_compares_as_it_reads(condition: str, passed: bool) -> None:
    gate = f"align.holdout.exact_match {condition}"
    assert (
        check_gates([gate], SCORES, default_checkpoints={"holdout": "full", "x": "full"})[0].passed
        is passed
    )


def test_all_unknown_scores_are_named_beside_those_that_exist() -> None:
    gates = ["holdout.accuracy >= 0.9", "swap.holdout.exact_match >= 0.1", "x.y > 0"]
    with pytest.raises(GateError) as caught:
        check_gates(gates, SCORES, default_checkpoints={"holdout": "full", "x": "full"})
    message = str(caught.value)
    assert "full.holdout.accuracy" in message
    assert "swap.holdout.exact_match" in message
    assert "full.x.y" in message
    assert "scores that exist: align.holdout.exact_match, full.holdout.exact_match" in message
