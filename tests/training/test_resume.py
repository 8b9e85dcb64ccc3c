"""Whole jobs under torchrun, killed and not, on a small energon dataset."""

import json
import re
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny.jobs import Run, kill, metrics, processes, run_job
from vlmcore.errors import ProcessError, TrainError
from vlmcore.training.job import TRAINABLE
from vlmcore.weights.convert import to_hf, to_mcore

STEPS = 12
SAVE_INTERVAL = 4
FIELDS = {"train_iters": STEPS, "save_interval": SAVE_INTERVAL, "lr_decay_style": "cosine"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(
    tiny_model: Callable[..., Path], tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """Runs the job of a folder: `run(folder, on_step)`; the folder keeps its scratch files."""
    model_dir = tmp_path_factory.mktemp("model")
    to_mcore(tiny_model("qwen3_vl"), model_dir)

    return partial(run_job, model_dir=model_dir, dataset=tiny_dataset, **FIELDS)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    to_hf(folder / "output", folder / "hf")
    return load_file(folder / "hf" / "model.safetensors")


def kill_once_written(files: Path, pattern: str, pids: list[int]) -> None:
    while not list(files.glob(pattern)):
        time.sleep(0.0005)
    kill(pids)


def test_a_killed_job_goes_on_as_if_nothing_had_happened(run: Run, tmp_path: Path) -> None:
    """The killed one also keeps encoded samples, which changes nothing."""
    whole = run(tmp_path / "whole")
    killed = tmp_path / "killed"
    scratch = killed / "scratch"
    encoded = {"cache_dir": tmp_path / "encoded"}
    seen: list[int] = []

    def on_step(found: int, at: int, action: Callable[[], None]) -> None:
        seen.append(found)
        if found == at:
            action()

    def kill_a_rank() -> None:
        kill(processes(killed, "RANK=1"))  # its loader's workers too

    def kill_while_writing() -> None:
        pids = processes(killed, "WORLD_SIZE=2")
        assert len(pids) >= 2
        where = scratch, f"iter_{2 * SAVE_INTERVAL:07d}.partial/*.distcp", pids
        threading.Thread(target=kill_once_written, args=where).start()

    with pytest.raises(ProcessError, match=r"\nrank 1 was killed by SIGKILL; if nobody sent it"):
        run(killed, lambda step: on_step(step, SAVE_INTERVAL + 2, kill_a_rank), **encoded)
    # from here on checkpoints are written by processes of their own, while training goes on
    beside = {"async_save": True, **encoded}
    with pytest.raises(ProcessError, match=r"\nrank [01] was killed by SIGKILL"):
        run(killed, lambda step: on_step(step, 2 * SAVE_INTERVAL - 1, kill_while_writing), **beside)
    checkpoints = {path.name for path in scratch.glob("iter_*")}
    assert checkpoints == {"iter_0000004", "iter_0000008.partial"}
    run(killed, lambda step: on_step(step, -1, kill_a_rank), **beside)

    starts = [after for before, after in zip([99, *seen], seen, strict=False) if after < before]
    assert starts == [0, SAVE_INTERVAL, SAVE_INTERVAL]
    assert {path.name for path in scratch.glob("iter_*")} == {"iter_0000008"}
    assert len(list((tmp_path / "encoded").glob("??/*"))) > 60
    expected, found = metrics(whole), metrics(killed)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    # not only within 1e-5: ranks of one thread each add up in one order, so two runs from nothing
    # and a run in three pieces agree bit for bit
    for name in ("loss", "grad_norm", "learning_rate", "tokens", "samples", "loss_tokens"):
        assert [row[name] for row in found] == [row[name] for row in expected], name
    before, after = weights(whole), weights(killed)
    assert all(torch.equal(after[key], before[key]) for key in before)

    assert len({row["loss"] for row in expected}) == STEPS
    assert all(row["largest_rank_memory_mb"] > 100 for row in expected)
    trainable = json.loads((whole / "output" / TRAINABLE).read_text())
    assert set(trainable) == {"vit", "aligner", "llm"}
    assert all(row["trainable"] == row["parameters"] > 0 for row in trainable.values())


def test_a_loss_that_is_not_finite_stops_the_job_and_keeps_the_batch(
    run: Run, tmp_path: Path
) -> None:
    with pytest.raises(TrainError, match=r"train\.step: step 2: loss nan") as stopped:
        run(tmp_path / "nan", learning_rate=1e30, min_lr=1e30, clip_grad=0.0)
    kept = Path(re.search(r"kept as (\S+\.pt)", str(stopped.value))[1])
    (row,) = torch.load(kept, weights_only=False)  # it holds where its samples came from, too
    assert 0 < len(row["input_ids"]) == len(row["labels"])
    assert not (tmp_path / "nan" / "output").exists()
