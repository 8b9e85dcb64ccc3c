import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmcore.errors import ProofError, WeightError
from vlmcore.surgery.proof import prove_swap
from vlmcore.surgery.swap import SwapLedger, scaled_section, swap_llm
from vlmcore.weights.architecture import check_against_architecture

WEIGHTS = "model.safetensors"
LLM = {"rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0}}
OTHER = {
    "hidden_size": 60,
    "intermediate_size": 90,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 20,
}
MERGERS = ("merger", "deepstack_merger_list.0", "deepstack_merger_list.1")
LAST_LAYERS = {
    f"model.visual.{merger}.linear_fc2.{part}" for merger in MERGERS for part in ("weight", "bias")
}


class Swap:
    """Two donors and what became of them."""

    def __init__(self, vlm: Path, llm: Path, target: Path) -> None:
        self.vlm, self.llm, self.target = vlm, llm, target
        self.ledger = swap_llm(vlm, llm, target, seed=3)

    def prove(self) -> dict:
        return prove_swap(self.target, self.vlm, self.llm, self.ledger)

    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.target / WEIGHTS)


@pytest.fixture
def swapped(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Swap]:
    def swap(*, tied: bool = False, vlm_tied: bool = False, **llm: object) -> Swap:
        donors = (
            tiny_model("qwen3_vl", tied=vlm_tied),
            tiny_model("qwen3", tied=tied, **(LLM | llm)),
        )
        return Swap(*donors, tmp_path / "swapped")

    return swap


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("llm", "vlm_tied"), [({}, False), (OTHER, True)], ids=["same width", "other width, tied shell"]
)
def test_the_proof_holds(
    swapped: Callable[..., Swap], llm: dict, tied: bool, vlm_tied: bool
) -> None:
    figures = swapped(tied=tied, vlm_tied=vlm_tied, **llm).prove()
    assert figures["text_logits_max_diff"] == 0.0
    assert figures["vision_max_diff"] == 0.0
    assert figures["missing_keys"] == figures["unexpected_keys"] == []
    assert figures["language_class"] == "Qwen3VLTextModel"
    assert figures["vision_class"] == "Qwen3VLVisionModel"


def test_another_width_leaves_the_last_layer_of_each_merger_fresh(
    swapped: Callable[..., Swap],
) -> None:
    swap = swapped(**OTHER)
    assert set(swap.ledger.fresh) == LAST_LAYERS
    assert swap.ledger.fresh["model.visual.merger.linear_fc2.weight"] == (
        "shape (48, 128) in the vision donor, (60, 128) here"
    )
    tensors = swap.tensors()
    for key in LAST_LAYERS:
        if key.endswith("bias"):
            assert not tensors[key].any()
        else:
            assert 0.015 < float(tensors[key].std()) < 0.025
    assert swap.ledger.to_json()["fresh"] == dict(swap.ledger.fresh)


def test_the_same_width_keeps_the_mergers(swapped: Callable[..., Swap]) -> None:
    swap = swapped()
    assert not swap.ledger.fresh
    tensors, donor = swap.tensors(), load_file(swap.vlm / WEIGHTS)
    vision = {key for key in donor if key.startswith("model.visual.")}
    assert set(swap.ledger.from_vlm) == vision
    assert all(torch.equal(tensors[key], donor[key]) for key in vision)


def test_every_tensor_of_the_llm_moves_in(swapped: Callable[..., Swap]) -> None:
    swap = swapped(**OTHER)
    donor, tensors = load_file(swap.llm / WEIGHTS), swap.tensors()
    assert sorted(swap.ledger.from_llm.values()) == sorted(donor)
    for home, key in swap.ledger.from_llm.items():
        assert torch.equal(tensors[home], donor[key])
    assert set(tensors) == (
        set(swap.ledger.from_llm) | set(swap.ledger.from_vlm) | set(swap.ledger.fresh)
    )
    check_against_architecture(swap.target)


def test_the_same_seed_draws_the_same_tensors(swapped: Callable[..., Swap], tmp_path: Path) -> None:
    swap = swapped(**OTHER)
    swap_llm(swap.vlm, swap.llm, tmp_path / "again", seed=3)
    swap_llm(swap.vlm, swap.llm, tmp_path / "other", seed=4)
    weights = (swap.target / WEIGHTS).read_bytes()
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == weights
    assert (tmp_path / "other" / WEIGHTS).read_bytes() != weights


def test_the_config_is_the_shells_round_the_llms(swapped: Callable[..., Swap]) -> None:
    config = json.loads((swapped(**OTHER).target / "config.json").read_text())
    rope = config["text_config"]["rope_parameters"]
    assert rope["rope_theta"] == 50_000.0
    assert rope["mrope_section"] == [6, 2, 2]  # of 10 pairs; the shell's 8 pairs are [4, 2, 2]
    assert rope["mrope_interleaved"] is True
    assert config["model_type"] == "qwen3_vl"
    assert config["text_config"]["model_type"] == "qwen3_vl_text"
    assert config["vision_config"]["out_hidden_size"] == 60
    assert config["text_config"]["num_hidden_layers"] == 4


def test_rope_theta_of_a_config_of_transformers_4_stays(
    swapped: Callable[..., Swap], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    llm = shutil.copytree(tiny_model("qwen3", **LLM), tmp_path / "llm4")
    config = json.loads((llm / "config.json").read_text())
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
    config["torch_dtype"] = config.pop("dtype")
    (llm / "config.json").write_text(json.dumps(config))
    swap = Swap(tiny_model("qwen3_vl"), llm, tmp_path / "target")
    swap.prove()
    rope = json.loads((swap.target / "config.json").read_text())["text_config"]["rope_parameters"]
    assert rope["rope_theta"] == 50_000.0


@pytest.mark.parametrize(
    ("section", "pairs", "scaled"),
    [
        ([24, 20, 20], 64, [24, 20, 20]),
        ([24, 20, 20], 32, [12, 10, 10]),
        ([16, 24, 24], 32, [8, 12, 12]),
        ([4, 2, 2], 9, [5, 2, 2]),
        ([6, 5, 5], 3, [3, 0, 0]),
    ],
)
def test_a_section_is_stretched_to_the_head(
    section: list[int], pairs: int, scaled: list[int]
) -> None:
    assert scaled_section(section, pairs) == scaled
    assert sum(scaled) == pairs


@pytest.mark.parametrize(
    ("vlm", "llm", "reason"),
    [
        ("qwen3_vl", "qwen3_vl", "no stock class holds a qwen3_vl exactly inside qwen3_vl"),
        ("qwen3", "qwen3", "model.vlm is a qwen3, which has no vision tower"),
    ],
)
def test_a_pair_that_no_class_holds_is_refused(
    tiny_model: Callable[..., Path], tmp_path: Path, vlm: str, llm: str, reason: str
) -> None:
    with pytest.raises(WeightError, match=reason):
        swap_llm(tiny_model(vlm), tiny_model(llm), tmp_path / "swapped", seed=0)
    assert not (tmp_path / "swapped").exists()


def test_a_tokenizer_without_image_tokens_is_refused(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    llm = shutil.copytree(tiny_model("qwen3"), tmp_path / "llm")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (llm / name).read_text()
        (llm / name).write_text(text.replace("<|image_pad|>", "<|other|>"))
    with pytest.raises(WeightError, match=r"tokenizer lacks <\|image_pad\|>"):
        swap_llm(tiny_model("qwen3_vl"), llm, tmp_path / "swapped", seed=0)


def test_a_stored_repetition_of_tied_embeddings_is_left_behind(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    llm = shutil.copytree(tiny_model("qwen3", tied=True), tmp_path / "llm")
    tensors = load_file(llm / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, llm / WEIGHTS, metadata={"format": "pt"})
    swap = Swap(tiny_model("qwen3_vl"), llm, tmp_path / "swapped")
    swap.prove()
    assert "lm_head.weight" not in swap.tensors()


@pytest.mark.parametrize(
    ("key", "figure"),
    [
        ("model.language_model.layers.1.mlp.up_proj.weight", "text_logits_max_diff"),
        ("model.language_model.layers.0.self_attn.q_norm.weight", "text_logits_max_diff"),
        ("model.visual.blocks.1.mlp.linear_fc1.weight", "vision_max_diff"),
    ],
)
def test_one_changed_tensor_fails_the_proof(
    swapped: Callable[..., Swap], key: str, figure: str
) -> None:
    swap = swapped()
    tensors = swap.tensors()
    tensors[key] *= 1.01
    save_file(tensors, swap.target / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ProofError, match=f"{figure}: .*, expected 0.0"):
        swap.prove()


def test_a_lost_tensor_fails_the_proof(swapped: Callable[..., Swap]) -> None:
    swap = swapped()
    tensors = swap.tensors()
    del tensors["model.language_model.norm.weight"]
    save_file(tensors, swap.target / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ProofError, match=r"missing_keys: \['model.language_model.norm.weight'\]"):
        swap.prove()


def test_a_damaged_donor_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    llm = shutil.copytree(tiny_model("qwen3"), tmp_path / "llm")
    tensors = load_file(llm / WEIGHTS)
    del tensors["model.layers.1.self_attn.q_norm.weight"]
    save_file(tensors, llm / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(WeightError, match="model.layers.1.self_attn.q_norm.weight: missing"):
        swap_llm(tiny_model("qwen3_vl"), llm, tmp_path / "swapped", seed=0)


def test_the_ledger_counts() -> None:
    ledger = SwapLedger({"a": "b", "c": "d"}, ("e",), {"f": "absent"})
    assert ledger.to_json() == {"from_llm": 2, "from_vlm": 1, "fresh": {"f": "absent"}}
