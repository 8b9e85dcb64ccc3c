"""Whole jobs that look at held-out data and end with the weights of the lowest loss."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny.datasets import numbers_dataset
from tests.tiny.jobs import Run, metrics, run_job
from vlmcore.errors import ProcessError, TrainError

STEPS, INTERVAL = 10, 2
FIELDS = {
    "train_iters": STEPS,
    "save_interval": 4,
    "learning_rate": 3e-2,  # soon too much: the loss falls, then rises
    "eval_interval": INTERVAL,
    "eval_iters": 3,
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs the job of a folder: `run(folder, on_step, **fields)`."""
    # the ranks get 7 and 6 of what is held out
    dataset = numbers_dataset(tmp_path_factory.mktemp("dataset"), train=40, val=13)
    return partial(run_job, model_dir=tiny_model("qwen3_vl"), dataset=dataset, **FIELDS)


def eval_losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["eval_loss"] for row in metrics(folder) if "eval_loss" in row}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "output" / "model.safetensors")


# what all runs of an engine say, and what the one that ends at the best step says besides
ENGINES = {
    "megatron": ({}, {"overlap_grad_reduce": True}),
    "transformers": ({"engine": "transformers", "fsdp": "fsdp2"}, {}),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stage_ends_with_the_weights_of_the_lowest_held_out_loss(
    run: Run, tmp_path: Path, engine: str
) -> None:
    killed = tmp_path / "best"
    fields, besides = ENGINES[engine]

    def stop_after(step: int) -> None:
        if step == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(killed, stop_after, **fields, load_best_model_at_end=True)
    whole = run(killed, **fields, load_best_model_at_end=True)
    losses = eval_losses(whole)
    assert list(losses) == [2, 4, 6, 8, 10]
    best = min(losses, key=losses.__getitem__)
    assert 2 < best < STEPS, losses
    short = run(tmp_path / "short", train_iters=best, **fields, **besides)
    assert eval_losses(short)[best] == pytest.approx(losses[best], rel=1e-6)
    found, expected = weights(whole), weights(short)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6, msg=name)


def test_a_dataset_that_holds_nothing_out_is_named(run: Run, tmp_path: Path) -> None:
    dataset = numbers_dataset(tmp_path / "numbers", train=40)
    with pytest.raises((TrainError, ProcessError), match=r"val split of numbers is empty") as found:
        run(tmp_path / "none", dataset=dataset, train_iters=2)
    assert "split_ratios" in str(found.value)
