"""A training stage with its artifacts and its store."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.caching import Ref, Run
from tasks.training import _figures, _what_trains, train
from tests.tiny.megatron import stage
from vlmcore.artifacts import BuildContext, Store


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


@pytest.mark.slow
def test_encoded_samples_stand_in_the_store_and_change_no_key(
    tiny_model: Callable[..., Path], tiny_dataset: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")

    def run_stage(*, cache_encoded_samples: bool) -> str:
        run = Run(store, log_dir=tmp_path / "logs")

        def copied(name: str, source: Path) -> Ref:
            def build(context: BuildContext) -> None:
                shutil.copytree(source, context.path, dirs_exist_ok=True)

            return run.stage(name, build, kind=name, version=1, params={}, inputs={})

        model, data = copied("model", tiny_model("qwen3_vl")), copied("data", tiny_dataset)
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
