import json
from pathlib import Path

import pytest

from vlmcore.training.progress import (
    MetricsFile,
    parse_error,
    parse_progress,
    report_error,
    report_progress,
)


def test_a_progress_line_carries_its_values(capsys: pytest.CaptureFixture[str]) -> None:
    report_progress(step=3, loss=0.5)
    line = capsys.readouterr().out.rstrip("\n")
    assert parse_progress(line) == {"step": 3, "loss": 0.5}
    assert parse_error(line) is None


def test_an_error_of_several_lines_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    report_error("train.a: first\n  second")
    line = capsys.readouterr().out.rstrip("\n")
    assert "\n" not in line
    assert parse_error(line) == "train.a: first\n  second"
    assert parse_progress(line) is None


def test_other_lines_are_neither() -> None:
    for line in ("", "loss 0.5", '@progress {"step": 3}@progress {"step"'):
        assert parse_progress(line) is None
        assert parse_error(line) is None


def test_metrics_past_the_checkpoint_are_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = "".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in range(1, 6))
    path.write_text(rows + '{"step": 6, "lo')  # what a kill left
    metrics = MetricsFile(path, after_step=3)
    metrics.write({"step": 4, "loss": 9.0})
    metrics.close()
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert found[-1]["loss"] == 9.0
