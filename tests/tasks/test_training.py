"""A training stage with its artifacts and its store."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tasks.caching import Ref, Run
from tasks.training import train
from tests.tiny.megatron import stage
from vlmcore.artifacts import BuildContext, Store


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
