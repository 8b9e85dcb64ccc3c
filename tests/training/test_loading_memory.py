"""What a rank's memory holds while a model is shared out."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vlmcore.training.launch import launch

WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 24}

pytestmark = pytest.mark.slow


def test_ranks_that_share_weights_never_hold_the_whole_model(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model("qwen3", **WIDE)
    whole = sum(path.stat().st_size for path in model.glob("*.safetensors")) / 2**20
    assert whole > 250  # MB
    folders = [str(model), str(tiny_model("qwen3"))]
    launch(
        "tests.training.memory_ranks",
        [*folders, str(tmp_path / "out.json")],
        nproc_per_node=2,
        log_path=tmp_path / "log",
    )
    rises = json.loads((tmp_path / "out.json").read_text())
    assert min(rises["whole"]) > 0.95 * whole  # what is measured shows the model
    for layout in ("fsdp", "zero3"):
        assert max(rises[layout]) < 0.75 * whole, rises  # half of it, and a few tensors at a time
