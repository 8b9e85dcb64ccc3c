import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmcore.training.launch import launch
from vlmcore.weights.convert import to_mcore

LAYOUTS = ("dp2", "tp2", "tp2_sp")
# with images, and without; tied and untied
MODELS = {"qwen3": ("qwen3", True), "qwen3_vl": ("qwen3_vl", False)}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Figures of every case, from one torchrun."""
    folder = tmp_path_factory.mktemp("steps")
    models = {}
    for name, (model_type, tied) in MODELS.items():
        hf = tiny_model(model_type, tied=tied)
        to_mcore(hf, folder / "mcore" / name)
        models[name] = [str(hf), str(folder / "mcore" / name)]
    (folder / "models.json").write_text(json.dumps(models))
    launch(
        "tests.training.step_cases",
        [str(folder / "models.json"), str(folder / "out.json")],
        nproc_per_node=2,
        log_path=folder / "log",
    )
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["qwen3 all", "qwen3_vl all", "qwen3_vl aligner"])
def test_a_step_equals_transformers_and_adamw(results: Any, case: str, layout: str) -> None:
    """Packed rows against samples alone, uneven over ranks, with clipping at work."""
    figures = results[f"{case} {layout}"]
    assert figures["clipped"]
    assert figures["loss"] <= 1e-5
    assert figures["grad_norm"] <= 1e-5
    assert figures["worst"][1] <= 1e-5, figures["worst"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_frozen_groups_stay_bit_identical_and_the_aligner_moves(results: Any, layout: str) -> None:
    moved = results[f"qwen3_vl aligner {layout}"]["moved"]
    assert len(moved) == 18  # three mergers of two linears and a norm, each weight and bias
    assert all("merger" in key for key in moved)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything_moves_where_nothing_is_frozen(results: Any, layout: str) -> None:
    for name in MODELS:
        figures = results[f"{name} all {layout}"]
        assert len(figures["moved"]) == figures["keys"]
