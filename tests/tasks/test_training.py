"""A training stage with its artifacts and its store."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.caching import Ref, Run, Watcher
from tasks.training import _figures, _make_room, _what_trains, train
from tests.tiny.megatron import stage
from vlmcore import proc
from vlmcore.artifacts import BuildContext, Store
from vlmcore.training.job import METRICS


def test_a_progress_line_says_what_its_step_has() -> None:
    step = {"step": 7, "total": 9, "loss": 0.51234, "learning_rate": 1e-3, "grad_norm": 1.25,
            "tokens_per_s": 12345.6}  # fmt: skip
    assert _figures({"step": 0, "total": 9}) == ""
    assert _figures(step) == "loss 0.5123  grad norm 1.25  lr 1.00e-03  12,346 tokens/s"
    more = step | {"eval_loss": 0.25, "aux_loss": 1.02, "mfu": 0.4512}
    assert _figures(more) == (
        "loss 0.5123  aux loss 1.0200  eval loss 0.2500  grad norm 1.25  lr 1.00e-03  "
        "12,346 tokens/s  MFU 45.1%"
    )


def test_what_trains_is_said_by_group() -> None:
    table = {"aligner": {"parameters": 1200, "trainable": 1200},
             "llm": {"parameters": 34567, "trainable": 0}}  # fmt: skip
    assert _what_trains(table) == "trains aligner 1,200 of 1,200, llm 0 of 34,567 parameters"


class Interrupts(Watcher):
    """Stops a run at a step; keeps what the stage says."""

    def __init__(self, step: int | None) -> None:
        self.step = step
        self.notes: list[str] = []

    def note(self, stage: str, text: str) -> None:
        self.notes.append(text)

    def progress(self, stage: str, done: float, total: float, text: str) -> None:
        if done == self.step:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_an_interrupted_stage_goes_on_at_another_layout(
    tiny_model: Callable[..., Path], tiny_dataset: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")

    def run_stage(watcher: Interrupts, **layout: object) -> Path:
        run = Run(store, log_dir=tmp_path / "logs", watcher=watcher)
        model, data = (
            copied(run, "model", tiny_model("qwen3_vl")),
            copied(run, "data", tiny_dataset),
        )
        told = stage(
            max_length=64, packing_buffer_size=24, train_iters=4, save_interval=2, log_interval=1,
            **layout,
        )  # fmt: skip
        trained = train(run, told, model=model, datasets=[data], weights=[1.0])
        assert trained is not None
        return trained.path

    with pytest.raises(KeyboardInterrupt):
        run_stage(Interrupts(3), nproc_per_node=1)
    watcher = Interrupts(None)
    split = {"nproc_per_node": 2, "tensor_model_parallel_size": 2}
    folder = run_stage(watcher, **split)
    assert watcher.notes[1:] == ["goes on from the checkpoint of step 2"]
    steps = [json.loads(line)["step"] for line in (folder / METRICS).read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


class JoinsAs(Watcher):
    """Does on a second machine what the first one says is to be done there."""

    def __init__(self, node_rank: int) -> None:
        self.node_rank = node_rank
        self.nodes: list[subprocess.Popen[bytes]] = []

    def note(self, stage: str, text: str) -> None:
        _, said, arguments = text.partition(": python ")
        if said:
            env = os.environ | {"NODE_RANK": str(self.node_rank)}
            command = [sys.executable, *shlex.split(arguments)]
            self.nodes.append(subprocess.Popen(command, env=env))


@pytest.mark.slow
def test_a_stage_over_two_nodes_says_what_the_other_one_runs(
    tiny_model: Callable[..., Path], tiny_dataset: Path, tmp_path: Path
) -> None:
    watcher = JoinsAs(1)
    run = Run(Store(tmp_path / "store"), log_dir=tmp_path / "logs", watcher=watcher)
    model, data = copied(run, "model", tiny_model("qwen3_vl")), copied(run, "data", tiny_dataset)
    told = stage(
        max_length=64, packing_buffer_size=24, train_iters=2, nnodes=2, nproc_per_node=1,
        global_batch_size=2, master_addr="127.0.0.1", master_port=proc.free_port(),
    )  # fmt: skip
    trained = train(run, told, model=model, datasets=[data], weights=[1.0])
    assert trained is not None
    (other,) = watcher.nodes
    assert other.wait(timeout=60) == 0
    assert len((trained.path / METRICS).read_text().splitlines()) == 2


def copied(run: Run, name: str, source: Path) -> Ref:
    """An artifact that holds what a folder does."""

    def build(context: BuildContext) -> None:
        shutil.copytree(source, context.path, dirs_exist_ok=True)

    return run.stage(name, build, kind=name, version=1, params={}, inputs={})


@pytest.mark.slow
def test_encoded_samples_stand_in_the_store_and_change_no_key(
    tiny_model: Callable[..., Path], tiny_dataset: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")

    def run_stage(*, cache_encoded_samples: bool) -> str:
        run = Run(store, log_dir=tmp_path / "logs")

        model, data = (
            copied(run, "model", tiny_model("qwen3_vl")),
            copied(run, "data", tiny_dataset),
        )
        told = stage(
            engine="transformers", nproc_per_node=1, max_length=64, packing_buffer_size=24,
            cache_encoded_samples=cache_encoded_samples,
        )  # fmt: skip
        train(run, told, model=model, datasets=[data], weights=[1.0])
        return run.outcomes[-1].state

    def listed() -> dict:
        done = subprocess.run(
            [sys.executable, "-m", "flows", "artifacts", "list", "--json",
             "--store", str(store.root)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return json.loads(done.stdout)["encoded_samples"]

    assert listed() == {"path": str(store.encoded_samples), "size_bytes": 0}
    assert run_stage(cache_encoded_samples=True) == "ran"
    entries = [path for path in store.encoded_samples.rglob("*") if path.is_file()]
    assert len(entries) > 24
    size = sum(path.stat().st_size for path in entries)
    assert listed() == {"path": str(store.encoded_samples), "size_bytes": size}
    assert store.verify() == []
    assert run_stage(cache_encoded_samples=False) == "cached"


def test_a_stage_says_what_of_the_encoded_samples_it_removes(tmp_path: Path) -> None:
    watcher = Interrupts(None)
    store = Store(tmp_path / "store")
    run = Run(store, log_dir=tmp_path / "logs", watcher=watcher)
    for i in range(4):
        path = store.encoded_samples / "ab" / f"{i:030x}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 2_000_000)
    _make_room(run, "train.s", store.encoded_samples, max_bytes=5_000_000)
    _make_room(run, "train.s", store.encoded_samples, max_bytes=5_000_000)
    assert watcher.notes == ["removed 4.0 MB of encoded samples, the longest unused"]
    assert store.encoded_samples_bytes() == 4_000_000
