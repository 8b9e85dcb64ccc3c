"""Whole jobs of the transformers engine under torchrun, killed and not, on a small dataset."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny.adapters import with_adapter
from tests.tiny.jobs import Run, kill, metrics, processes, run_job
from vlmcore.errors import ProcessError, TrainError
from vlmcore.training.job import ADAPTER, TRAINABLE
from vlmcore.weights.convert import to_mcore

STEPS, SAVE_INTERVAL = 8, 3
FIELDS = {
    "engine": "transformers",
    "train_iters": STEPS,
    "save_interval": SAVE_INTERVAL,
    "lr_decay_style": "cosine",
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tiny_model: Callable[..., Path], tiny_dataset: Path) -> Run:
    """Runs the job of a folder: `run(folder, on_step)`; the folder keeps its scratch files."""
    return partial(run_job, model_dir=tiny_model("qwen3_vl"), dataset=tiny_dataset, **FIELDS)


def test_a_killed_job_goes_on_as_if_nothing_had_happened(run: Run, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    killed = tmp_path / "killed"
    seen: list[int] = []

    def on_step(step: int) -> None:
        seen.append(step)
        if step == SAVE_INTERVAL + 2 and len(seen) < STEPS:
            kill(processes(killed, "RANK=1"))

    with pytest.raises(ProcessError):
        run(killed, on_step)
    seen.clear()
    seen.extend([0] * STEPS)  # from here on nothing is killed
    run(killed, on_step)

    assert seen[STEPS] == SAVE_INTERVAL
    expected, found = metrics(whole), metrics(killed)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "learning_rate", "tokens", "samples", "loss_tokens"):
        assert [row[name] for row in found] == [row[name] for row in expected], name
    before, after = (load_file(f / "output" / "model.safetensors") for f in (whole, killed))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert len({row["loss"] for row in expected}) == STEPS
    assert all(row["largest_rank_memory_mb"] > 100 for row in expected)
    trainable = json.loads((whole / "output" / TRAINABLE).read_text())
    assert set(trainable) == {"vit", "aligner", "llm"}
    assert all(row["trainable"] == row["parameters"] > 0 for row in trainable.values())


def test_another_number_of_ranks_goes_on_from_a_checkpoint(run: Run, tmp_path: Path) -> None:
    seen: list[int] = []
    run(tmp_path, train_iters=SAVE_INTERVAL + 1, save_interval=1, save_total_limit=2)
    before = metrics(tmp_path)
    kept = {path.name for path in (tmp_path / "scratch").glob("iter_*")}
    assert kept == {f"iter_{step:07d}" for step in (SAVE_INTERVAL - 1, SAVE_INTERVAL)}
    shutil.rmtree(tmp_path / "output")
    run(tmp_path, seen.append, train_iters=SAVE_INTERVAL + 2, nproc_per_node=1)
    assert seen[0] == SAVE_INTERVAL
    after = metrics(tmp_path)
    assert len(after) == SAVE_INTERVAL + 2
    assert after[:SAVE_INTERVAL] == before[:SAVE_INTERVAL]


def test_an_adapter_stands_beside_the_model_that_has_it_merged(
    run: Run, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    out = run(tmp_path, tuner_type="lora", train_iters=3, nproc_per_node=1) / "output"
    merged = with_adapter(tiny_model("qwen3_vl"), out / ADAPTER).merge_and_unload().state_dict()
    found = load_file(out / "model.safetensors")
    assert {path.name for path in (out / ADAPTER).iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    key = "model.language_model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(found[key], merged[key])
    before = load_file(tiny_model("qwen3_vl") / "model.safetensors")
    assert not torch.equal(found[key], before[key])
    assert (out / "preprocessor_config.json").exists() or (out / "processor_config.json").exists()


def test_a_loss_that_is_not_finite_stops_the_job_and_keeps_the_batch(
    run: Run, tmp_path: Path
) -> None:
    with pytest.raises(TrainError, match=r"train\.step: step 2: loss nan.*rank0\.pt") as stopped:
        run(
            tmp_path, learning_rate=1e30, min_lr=1e30, clip_grad=0.0, nproc_per_node=1,
            global_batch_size=1,
        )  # fmt: skip
    (row,) = torch.load(tmp_path / "scratch" / "bad_batch_rank0.pt", weights_only=False)
    assert 0 < len(row["input_ids"]) == len(row["labels"])
    assert len(row["keys"]) > 1  # packed
    assert f"{len(row['keys'])} samples" in str(stopped.value)
    assert row["keys"][1] in str(stopped.value)
    assert not (tmp_path / "output").exists()


def test_a_loss_of_routers_on_a_model_without_experts_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"moe_z_loss_coeff: a loss of routers, .* no experts"):
        run(tmp_path, moe_z_loss_coeff=0.1, nproc_per_node=1, global_batch_size=1)


def test_a_megatron_folder_is_refused_with_the_remedy(
    run: Run, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    to_mcore(tiny_model("qwen3_vl"), tmp_path / "mcore")
    with pytest.raises(TrainError, match="is no HF model folder.*vlmflow convert to-hf"):
        run(tmp_path / "run", model_dir=tmp_path / "mcore", nproc_per_node=1)
