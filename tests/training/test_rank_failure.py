"""Which rank is blamed, told from lines as torchrun 2.13 and its ranks print them."""

from pathlib import Path

import pytest

from vlmcore.errors import ProcessError
from vlmcore.training.launch import launch
from vlmcore.training.rank_failure import RankFailures

GONE = "RuntimeError: [pair.cc:553] Connection closed by peer [127.0.0.1]:20883. GLHF!"


def traceback(rank: int, error: str) -> list[str]:
    return [
        f"[rank{rank}]: Traceback (most recent call last):",
        f'[rank{rank}]:   File "loop.py", line 7, in train',
        f"[rank{rank}]: {error}",
    ]


def summary(rank: int, exit_code: int) -> list[str]:
    return [
        "  time      : 2026-11-21_12:44:42",
        f"  rank      : {rank} (local_rank: {rank})",
        f"  exitcode  : {exit_code} (pid: 1234)",
    ]


def cause(*lines: str) -> str | None:
    failures = RankFailures()
    for line in lines:
        failures.hear(line)
    return failures.cause()


def test_a_ranks_own_error_stands_before_the_echo_in_the_others() -> None:
    own = traceback(2, "KeyError: 'weight'")
    found = cause(*traceback(0, GONE), *own, *traceback(3, GONE), *summary(0, 1), *summary(2, 1))
    assert found == "\n".join(own)


def test_lines_of_several_ranks_that_die_at_once_are_told_apart() -> None:
    own, echo = traceback(1, "ValueError: no"), traceback(0, GONE)
    mixed = [line for pair in zip(echo, own, strict=True) for line in pair]
    assert cause(*mixed) == "\n".join(own)


def test_a_killed_rank_leaves_no_traceback_and_is_named() -> None:
    lines = [*traceback(0, GONE), *summary(0, 1), *summary(1, -9), *summary(2, -15)]
    assert cause(*lines) == (
        "rank 1 was killed by SIGKILL; if nobody sent it, the machine ran out of memory"
    )


def test_an_echo_is_better_than_nothing() -> None:
    echo = traceback(0, GONE)
    assert cause(*echo) == "\n".join(echo)
    assert cause("loss 0.5") is None


@pytest.mark.slow
def test_the_error_of_a_run_begins_with_the_traceback_of_the_rank_that_failed(
    tmp_path: Path,
) -> None:
    with pytest.raises(ProcessError) as found:
        launch(
            "tests.training.failing_ranks", [], nproc_per_node=2, log_path=tmp_path / "log"
        )  # fmt: skip
    first, traceback, *_, last = str(found.value).splitlines()
    assert first.startswith("tests.training.failing_ranks: a rank died (whole output: ")
    assert traceback == "[rank1]: Traceback (most recent call last):"
    assert last == "[rank1]: KeyError: 'the weight that nobody has'"
