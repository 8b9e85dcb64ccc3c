"""Whole jobs that look at held-out data and end with the weights of the lowest loss."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_prep.energon import prepare
from data_prep.shards import write_shards
from data_prep.sources import fetch
from tests.tiny.megatron import stage
from vlmcore.errors import ProcessError, TrainError
from vlmcore.training.job import METRICS, TrainJob
from vlmcore.training.launch import launch

STEPS, INTERVAL = 10, 2
FIELDS = {
    "train_iters": STEPS,
    "save_interval": 4,
    "log_interval": 1,
    "learning_rate": 3e-2,  # soon too much: the loss falls, then rises
    "max_length": 64,
    "packing_buffer_size": 24,
    "eval_interval": INTERVAL,
    "eval_iters": 3,
}

pytestmark = pytest.mark.slow
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """An energon dataset of which so many samples are held out."""

    def build(held_out: int) -> Path:
        folder = tmp_path_factory.mktemp("dataset")
        options = {"train": 40, "val": held_out, "test": 4}
        fetch("builtin:handwritten_numbers", folder / "raw", options=options, seed=0)
        write_shards(
            folder / "raw",
            folder / "shards",
            max_bad_ratio=0.0,
            num_workers=1,
            max_samples_per_shard=20,
        )
        prepare(folder / "shards", folder / "energon")
        return folder / "energon"

    return build


@pytest.fixture(scope="module")
def run(tiny_model: Callable[..., Path], dataset: Callable[[int], Path]) -> Run:
    """Runs the job of a folder: `run(folder, on_step, **fields)`."""
    model_dir = tiny_model("qwen3_vl")
    enough = dataset(13)  # the ranks get 7 and 6 of them

    def run_job(
        folder: Path,
        on_step: Callable[[int], None] = lambda _: None,
        *,
        data: Path = enough,
        **fields: Any,
    ) -> Path:
        (folder / "scratch").mkdir(parents=True, exist_ok=True)
        job = TrainJob(
            stage=stage(**(FIELDS | fields)),
            model_dir=model_dir,
            datasets={data: 1.0},
            output_dir=folder / "output",
            scratch_dir=folder / "scratch",
        )
        (folder / "job.json").write_text(job.model_dump_json())
        launch(
            "vlmcore.training.main",
            ["--job", str(folder / "job.json")],
            nproc_per_node=2,
            log_path=folder / "log",
            on_progress=lambda values: on_step(values["step"]),
        )
        return folder

    return run_job


def eval_losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "output" / METRICS).read_text().splitlines()]
    return {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "output" / "model.safetensors")


def test_a_stage_ends_with_the_weights_of_the_lowest_held_out_loss(
    run: Run, tmp_path: Path
) -> None:
    killed = tmp_path / "best"

    def stop_after(step: int) -> None:
        if step == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(killed, stop_after, load_best_model_at_end=True)
    whole = run(killed, load_best_model_at_end=True)
    losses = eval_losses(whole)
    assert list(losses) == [2, 4, 6, 8, 10]
    best = min(losses, key=losses.__getitem__)
    assert 2 < best < STEPS, losses
    short = run(tmp_path / "short", train_iters=best, overlap_grad_reduce=True)
    assert eval_losses(short)[best] == pytest.approx(losses[best], rel=1e-6)
    found, expected = weights(whole), weights(short)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6, msg=name)


def test_a_dataset_that_holds_nothing_out_is_named(
    run: Run, dataset: Callable[[int], Path], tmp_path: Path
) -> None:
    with pytest.raises((TrainError, ProcessError), match=r"val split of numbers is empty") as found:
        run(tmp_path / "none", data=dataset(0), train_iters=2)
    assert "split_ratios" in str(found.value)
