"""Megatron-Core against transformers, every family at every kind of layout, in one launch.

Tolerance: logits of these models are below 10 and sums of at most 80 terms, where fp32 rounds at
1e-6, a few layers one behind the other; `tests.families.parity.tolerance_of` names the exceptions.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.families.parity import tolerance_of
from vlmcore.families import FAMILIES
from vlmcore.layout import Layout, ranks_for
from vlmcore.training.launch import launch
from vlmcore.weights.convert import to_mcore

pytestmark = pytest.mark.slow


def layout(*, tp: int = 1, pp: int = 1, vpp: int = 1, ep: int = 1, etp: int = 1) -> Layout:
    return Layout(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        sequence_parallel=tp == 2,
    )


# a launch holds all of it, so tied and untied models share the layouts between them
DENSE = (layout(), layout(tp=4), layout(tp=2, pp=2), layout(pp=2, vpp=2))
EXPERTS = (
    layout(),
    layout(ep=2),
    layout(etp=2),
    layout(tp=4, ep=2, etp=2),
    layout(tp=2, pp=2, ep=2),
    layout(pp=2, vpp=2, etp=2),
)
TIED = (layout(tp=2), layout(pp=2))
MOE = {"qwen3_moe", "qwen3_vl_moe"}
DEEPSTACK = {"qwen3_vl", "qwen3_vl_moe"}
# what a family can be besides its tiny model
VARIANTS: dict[str, tuple[str, dict[str, Any], tuple[Layout, ...]]] = {
    "probabilities as they are": ("qwen3_moe", {"norm_topk_prob": False}, EXPERTS[:1]),
    "llama3 frequencies": ("llama", {"rope_type": "llama3"}, DENSE[:1]),
    "internvl with experts": ("internvl", {"text_type": "qwen3_moe"}, EXPERTS[3:4]),
    "internvl with qwen2": ("internvl", {"text_type": "qwen2"}, DENSE[1:2]),
    "llava_onevision with qwen3": ("llava_onevision", {"text_type": "qwen3"}, DENSE[1:2]),
}
# a weight changed in the HF folder alone → where the test has to see it first
WRONG = {
    "model.language_model.layers.1.mlp.down_proj.weight": "model.language_model.layers.1 ",
    "model.language_model.layers.1.input_layernorm.weight": "model.language_model.layers.1 ",
    "model.language_model.embed_tokens.weight": "embeddings ",
    "model.visual.merger.linear_fc2.weight": "vision features ",
    "model.language_model.norm.weight": "final norm or lm_head ",
}
WRONG_AT = (layout(tp=2, pp=2),)


def num_layers(name: str) -> int:
    """Deepstack features enter two layers, all of them on the first of four stages."""
    return 8 if name in DEEPSTACK else 4


@pytest.fixture(scope="module")
def results(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """Rows of every case, from one torchrun."""
    folder = tmp_path_factory.mktemp("parity")
    cases: dict[str, Any] = {}

    def add(case: str, hf: Path, layouts: tuple[Layout, ...], mcore: Path | None = None) -> Path:
        if mcore is None:
            mcore = folder / "mcore" / case
            to_mcore(hf, mcore)
        sizes = [asdict(item) for item in layouts]
        cases[case] = {"hf": str(hf), "mcore": str(mcore), "layouts": sizes}
        return mcore

    for name in sorted(FAMILIES):
        for tied in (False, True):
            hf = tiny_model(name, tied=tied, num_hidden_layers=num_layers(name))
            layouts = TIED if tied else EXPERTS if name in MOE else DENSE
            add(f"{name}-{'tied' if tied else 'untied'}", hf, layouts)
    for case, (name, options, layouts) in VARIANTS.items():
        add(case, tiny_model(name, num_hidden_layers=4, **options), layouts)
    right = tiny_model("qwen3_vl", num_hidden_layers=8)
    for key in WRONG:
        wrong = shutil.copytree(right, folder / "hf" / key)
        tensors = load_file(wrong / "model.safetensors")
        tensors[key] = tensors[key] * torch.linspace(0.9, 1.1, tensors[key].shape[-1])
        save_file(tensors, wrong / "model.safetensors", metadata={"format": "pt"})
        add(key, wrong, WRONG_AT, folder / "mcore" / "qwen3_vl-untied")
    (folder / "cases.json").write_text(json.dumps(cases))
    launch(
        "tests.families.parity",
        [str(folder / "cases.json"), str(folder / "out.json")],
        nproc_per_node=ranks_for((*DENSE, *EXPERTS)),
        log_path=folder / "log",
    )
    found: dict[str, list[dict[str, Any]]] = json.loads((folder / "out.json").read_text())
    return found


def samples_of(name: str) -> set[str]:
    if FAMILIES[name].vision is None:
        return {"text"}
    images = {"text", "one image", "images of different sizes", "several images"}
    return images if name == "llava" else images | {"video"}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_megatron_computes_what_transformers_computes(
    results: dict[str, list[dict[str, Any]]], name: str, tied: bool
) -> None:
    case = f"{name}-{'tied' if tied else 'untied'}"
    rows = results[case]
    layouts = TIED if tied else EXPERTS if name in MOE else DENSE
    assert {row["layout"] for row in rows} == {str(item) for item in layouts}
    assert {row["sample"] for row in rows} == samples_of(name)
    assert max(row["max_diff"] for row in rows) <= tolerance_of(case), rows
    assert all(row["passed"] and row["diverges_at"] is None for row in rows)
    for row in rows:
        assert 0 < row["loss_tokens"]["num_tokens"] < row["num_tokens"]
        assert row["loss_tokens"]["max_diff"] <= row["max_diff"]
        assert row["top1_agreement"] == row["loss_tokens"]["top1_agreement"] == 1


def test_transformers_itself_rounds_half_as_much_as_the_tolerance_of_deep_models(
    tiny_model: Callable[..., Path],
) -> None:
    import transformers

    folder = tiny_model("qwen3_vl", num_hidden_layers=num_layers("qwen3_vl"))
    ids = torch.randint(5, 20, (6, 60), generator=torch.Generator().manual_seed(0))
    in_fp32, in_float64 = (
        transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
        for dtype in (torch.float32, torch.float64)
    )
    with torch.no_grad():
        apart = (in_fp32(input_ids=ids).logits - in_float64(input_ids=ids).logits).abs().max()
    assert tolerance_of("qwen3_vl") / 6 < float(apart) < tolerance_of("qwen3_vl") / 2


@pytest.mark.parametrize("case", VARIANTS)
def test_so_it_does_for_what_a_family_can_be(
    results: dict[str, list[dict[str, Any]]], case: str
) -> None:
    assert max(row["max_diff"] for row in results[case]) <= tolerance_of(case), results[case]


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_weight_is_seen_and_its_place_named(
    results: dict[str, list[dict[str, Any]]], key: str
) -> None:
    for row in results[key]:
        if "visual" in key and row["sample"] == "text":
            assert row["passed"], row
        else:
            assert not row["passed"], row
            assert row["max_diff"] > 1e-3, row
            assert row["diverges_at"].startswith(WRONG[key]), row
