"""What ranks would refuse is refused by `plan` and `run` before anything is built."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.faults import machine_faults
from flows.pipeline import run_pipeline
from tasks.caching import Run
from vlmcore.artifacts import Store
from vlmcore.errors import TrainError
from vlmcore.recipe import load_recipe
from vlmcore.serving import engines

TinyModel = Callable[..., Path]
TRAIN: dict[str, Any] = {"data": ["d"], "train_iters": 1}


def write_recipe(folder: Path, model: dict[str, str], *stages: dict[str, Any]) -> Path:
    rows = folder / "rows"
    rows.mkdir()
    (rows / "train.jsonl").write_text('{"messages": [{"role": "user", "content": "1"}, '
                                      '{"role": "assistant", "content": "2"}]}\n')  # fmt: skip
    path = folder / "recipe.yaml"
    recipe = {"name": "r", "model": model, "data": {"d": {"source": f"path:{rows}"}}}
    path.write_text(yaml.safe_dump(recipe | {"train": [TRAIN | stage for stage in stages]}))
    return path


@pytest.mark.parametrize("command", ["plan", "run"])
def test_every_fault_of_every_stage_is_told_before_anything_is_built_and_without_torch(
    tiny_model: TinyModel, tmp_path: Path, command: str
) -> None:
    ranks = {"tensor_model_parallel_size": 3, "nproc_per_node": 3, "global_batch_size": 3}
    recipe = write_recipe(
        tmp_path,
        {"vlm": f"path:{tiny_model('qwen3_vl')}", "llm": f"path:{tiny_model('qwen3')}"},
        {"name": "teach", "model": "llm", "vit_lr": 0.1},
        {"name": "align", "tuner_type": "lora", "target_modules": ["qproj"], **ranks},
        {"name": "full", "freeze_llm": True, "trainable_parameters_regex": "linear_qvk"},
    )
    code = (
        "import sys, flows.cli; sys.argv[0] = 'vlmflow'\n"
        "try: flows.cli.main()\n"
        "finally: print({'torch', 'transformers', 'prefect'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, command, str(recipe), "--store", str(tmp_path / "store")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout.strip() == "set()"
    heading, *faults = done.stderr.strip().splitlines()
    assert heading == "error: the recipe would fail with 4 faults:"
    assert [fault.strip()[:20] for fault in faults] == [
        "train.teach: vit_lr ",
        "train.align: layout ",
        "train.align: target_",
        "train.full: trainabl",
    ]
    assert not (tmp_path / "store").exists()


def test_a_donor_that_has_to_be_built_is_looked_at_as_soon_as_it_is_there(tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path,
        {"vlm": "builtin:tiny-qwen3-vl", "llm": "builtin:tiny-qwen3"},
        {"name": "teach", "model": "llm"},
        {"name": "full", "tuner_type": "lora", "target_modules": ["qproj"]},
    )
    run = Run(Store(tmp_path / "store"), log_dir=tmp_path / "logs")
    with pytest.raises(TrainError, match=r"1 fault:\n  train.full: target_modules: qproj"):
        run_pipeline(run, load_recipe(path))
    assert [outcome.name for outcome in run.outcomes][-2:] == ["model.vlm", "model.llm"]


def test_donors_that_no_shell_holds_are_refused_with_the_other_faults(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    recipe = write_recipe(
        tmp_path,
        {"vlm": f"path:{tiny_model('qwen3_vl')}", "llm": f"path:{tiny_model('qwen2')}"},
        {"name": "teach", "model": "llm", "tuner_type": "lora", "target_modules": ["qproj"]},
    )
    done = subprocess.run(
        [sys.executable, "-m", "flows", "plan", str(recipe), "--store", str(tmp_path / "store")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "2 faults" in done.stderr and "Traceback" not in done.stderr
    assert "model: qwen2 into qwen3_vl: " in done.stderr
    assert "train.teach: target_modules: qproj" in done.stderr


def test_a_server_that_is_not_installed_is_missed_before_the_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = load_recipe("handwritten_numbers", ["serve.engine=vllm"])
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    (fault,) = machine_faults(recipe, ["train.full", "evaluate.full.holdout"])
    assert "serve.engine is vllm, but vLLM is not installed" in fault
    assert machine_faults(recipe, ["train.full"]) == []
