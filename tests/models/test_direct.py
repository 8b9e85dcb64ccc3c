import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny.forms import as_hub
from vlmcore.training.launch import launch
from vlmcore.weights.boxes import overlap
from vlmcore.weights.convert import to_mcore
from vlmcore.weights.global_tensors import HFGlobalTensors

FOUR_LAYERS = {"num_hidden_layers": 4}  # divisible over two stages
CASES = {
    "dense at TP 2, padded vocabulary": ("qwen3", {}, {"tensor_model_parallel_size": 2}),
    "tied over PP 2": ("qwen2", {"tied": True, **FOUR_LAYERS}, {"pipeline_model_parallel_size": 2}),
    "experts at EP 2": ("qwen3_moe", {}, {"expert_model_parallel_size": 2}),
    "fused experts cut at ETP 2": ("qwen3_vl_moe", {}, {"expert_tensor_parallel_size": 2}),
    "vision at PP 2": ("qwen2_5_vl", FOUR_LAYERS, {"pipeline_model_parallel_size": 2}),
    "replicas": ("qwen3_vl", {}, {}),
}


@pytest.mark.slow
def test_ranks_read_and_write_hf_folders_as_a_conversion_would(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    cases = {}
    for i, (name, (family, options, layout)) in enumerate(CASES.items()):
        hf = as_hub(tiny_model(family, **options), tmp_path / f"hf{i}")
        to_mcore(hf, tmp_path / f"mcore{i}")
        folders = {"hf": hf, "mcore": tmp_path / f"mcore{i}", "out": tmp_path / f"out{i}"}
        cases[name] = {key: str(path) for key, path in folders.items()} | {"layout": layout}
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    launch(
        "tests.models.direct_ranks",
        [str(tmp_path / "cases.json"), str(tmp_path / "results.json")],
        nproc_per_node=2,
        log_path=tmp_path / "log",
    )
    assert json.loads((tmp_path / "results.json").read_text()) == {name: [] for name in CASES}
    for name, case in cases.items():
        expected = load_file(Path(case["hf"]) / "model.safetensors")
        files = sorted(Path(case["out"]).glob("*.safetensors"))
        found = {key: tensor for file in files for key, tensor in load_file(file).items()}
        assert found.keys() == expected.keys(), name
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
        assert len(files) > 1


def test_a_box_is_cut_out_of_the_fused_tensors(tiny_model: Callable[..., Path]) -> None:
    source = HFGlobalTensors(tiny_model("qwen3"))
    key = "decoder.layers.mlp.linear_fc1.weight"
    whole = source.read(key, (1, 0, 0), (1, 160, 48), dtype=torch.float32)
    stored = load_file(tiny_model("qwen3") / "model.safetensors")
    gate, up = (stored[f"model.layers.1.mlp.{x}_proj.weight"] for x in ("gate", "up"))
    assert torch.equal(whole[0], torch.cat([gate, up]))
    across = source.read(key, (1, 70, 8), (1, 20, 16), dtype=torch.float32)
    assert torch.equal(across[0], torch.cat([gate, up])[70:90, 8:24])


def test_rows_that_pad_the_vocabulary_are_zero(tiny_model: Callable[..., Path]) -> None:
    source = HFGlobalTensors(tiny_model("qwen3"))
    rows = source.read("output_layer.weight", (320, 0), (4, 48), dtype=torch.float32)
    head = load_file(tiny_model("qwen3") / "model.safetensors")["lm_head.weight"]
    assert torch.equal(rows[0], head[320])
    assert not rows[1:].any()


def test_boxes_that_do_not_meet_share_nothing() -> None:
    assert overlap((0, 0), (2, 3), (1, 1), (5, 1)) == ((1, 1), (2, 2))
    assert overlap((0, 0), (2, 3), (2, 0), (1, 3)) is None
