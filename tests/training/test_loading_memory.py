"""What ranks hold while a model is shared out, and what the log says of their memory."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmcore.training.launch import launch

WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 24}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measured(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Figures of both ranks in MB, from one torchrun; `size` is that of the whole model."""
    model, folder = tiny_model("qwen3", **WIDE), tmp_path_factory.mktemp("memory")
    launch(
        "tests.training.memory_ranks",
        [str(model), str(tiny_model("qwen3")), str(folder / "out.json")],
        nproc_per_node=2,
        log_path=folder / "log",
    )
    size = sum(path.stat().st_size for path in model.glob("*.safetensors")) / 2**20
    assert size > 250
    return json.loads((folder / "out.json").read_text()) | {"size": size}


@pytest.mark.parametrize("layout", ["fsdp", "zero3"])
def test_ranks_that_share_weights_never_hold_the_whole_model(measured: Any, layout: str) -> None:
    assert min(measured["whole"]) > 0.95 * measured["size"]  # what is measured shows the model
    assert max(measured[layout]) < 0.75 * measured["size"]  # half of it, and single tensors


def test_the_log_has_the_memory_of_the_rank_that_took_most(measured: Any) -> None:
    first, second = measured["own"]
    assert second > first + 200
    assert measured["largest"] == pytest.approx([second, second], rel=0.01)
    assert measured["sums"] == [4.0, 1.0]
