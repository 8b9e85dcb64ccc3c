"""What a plan says of stages whose inputs are still to be built."""

from pathlib import Path

from tasks.caching import Ref, Run
from vlmcore.artifacts import BuildContext, Store


def walk(folder: Path, *, dry: bool, rows: int) -> Run:
    """Two datasets and a training stage that reads both."""
    run = Run(Store(folder / "store"), log_dir=folder / "logs", dry=dry)

    def write(context: BuildContext) -> None:
        (context.path / "content").write_text(str(rows))

    def stage(name: str, params: dict[str, int], inputs: dict[str, list[Ref]]) -> Ref:
        return run.stage(name, write, kind=name, version=1, params=params, inputs=inputs)

    datasets = [stage("data.a", {"rows": rows}, {}), stage("data.b", {}, {})]
    stage("train", {}, {"data": datasets})
    return run


def test_a_plan_explains_a_stage_of_which_one_of_several_inputs_changed(tmp_path: Path) -> None:
    walk(tmp_path, dry=False, rows=1)
    planned = {outcome.name: outcome for outcome in walk(tmp_path, dry=True, rows=2).outcomes}
    assert {name: outcome.state for name, outcome in planned.items()} == {
        "data.a": "to run",
        "data.b": "cached",
        "train": "to run",
    }
    assert planned["train"].reasons == ("input data: built first",)
