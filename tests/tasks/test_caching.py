from contextlib import suppress

import pytest

from tasks.caching import Run, UntilReached, Watcher, matches
from vlmcore.artifacts import Store
from vlmcore.errors import ArtifactError


class Walk:
    """Three stages in a row: rows → model → score."""

    def __init__(self, store: Store, tmp_path, *, rate: float = 0.1, text: str = "rows", **options):
        self.run = Run(store, log_dir=tmp_path / "logs", **options)
        self.built: list[str] = []
        with suppress(UntilReached):
            self._walk(rate, text)

    def _walk(self, rate: float, text: str) -> None:
        rows = self._stage("data.rows", text, {"text": text}, {})
        model = self._stage(
            "train.full", f"model of {text} at {rate}", {"rate": rate}, {"in": rows}
        )
        self._stage("evaluate.full", f"score of {model}", {}, {"model": model})

    def _stage(self, name, content, params, inputs):
        def build(context):
            self.built.append(name)
            (context.path / "content").write_text(content)

        return self.run.stage(
            name, build, kind=name.partition(".")[0], version=1, params=params, inputs=inputs
        )

    @property
    def states(self):
        return {outcome.name: outcome.state for outcome in self.run.outcomes}

    @property
    def reasons(self):
        return {outcome.name: outcome.reasons for outcome in self.run.outcomes}


@pytest.fixture
def walk(tmp_path):
    store = Store(tmp_path / "store")
    return lambda **options: Walk(store, tmp_path, **options)


ALL = ["data.rows", "train.full", "evaluate.full"]


def test_a_second_walk_builds_nothing(walk):
    assert walk().built == ALL
    again = walk()
    assert again.built == []
    assert set(again.states.values()) == {"cached"}


def test_another_parameter_rebuilds_from_there_and_says_why(walk):
    walk()
    planned = walk(rate=0.2, dry=True)
    assert planned.built == []
    assert planned.states == {
        "data.rows": "cached", "train.full": "to run", "evaluate.full": "to run",
    }  # fmt: skip
    assert planned.reasons["train.full"] == ("rate: 0.1 → 0.2",)
    assert planned.reasons["evaluate.full"] == ("input model: built first",)
    assert walk(rate=0.2).built == ["train.full", "evaluate.full"]
    assert walk(rate=0.1).built == []  # the older one is still there


def test_refresh_with_the_same_outcome_stops_there(walk):
    walk()
    assert walk(refresh=["train"]).built == ["train.full"]


def test_until_ends_after_that_stage(walk):
    assert walk(until="train.full").built == ["data.rows", "train.full"]


def test_from_builds_nothing_before_it(walk):
    with pytest.raises(ArtifactError, match="--from train: data.rows comes before it"):
        walk(start_from="train")
    walk(until="data.rows")
    assert walk(start_from="train").built == ["train.full", "evaluate.full"]


def test_a_prefix_ends_at_a_dot():
    assert matches("train.full", "train") and matches("train.full", "train.full")
    assert not matches("train.full", "train.fu") and not matches("trainer.full", "train")


def test_a_failed_stage_is_noted_and_its_error_comes_through(tmp_path):
    heard = []

    class Listener(Watcher):
        def finished(self, outcome):
            heard.append((outcome.name, outcome.state))

    def fail(context):
        raise ArtifactError("no")

    run = Run(Store(tmp_path / "store"), log_dir=tmp_path, watcher=Listener())
    with pytest.raises(ArtifactError, match="no"):
        run.stage("data.rows", fail, kind="data", version=1, params={}, inputs={})
    assert heard == [("data.rows", "failed")]
