import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.surgery.conftest import WEIGHTS, Swap
from tests.tiny.forms import as_hub
from vlmcore.errors import ProofError, WeightError
from vlmcore.surgery.shells import SHELLS
from vlmcore.surgery.swap import swap_llm
from vlmcore.surgery.swapped_config import scaled_section
from vlmcore.weights.architecture import check_against_architecture

Swapped = Callable[..., Swap]

OTHER = {
    "hidden_size": 60,
    "intermediate_size": 90,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 20,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
}
PAIRS = [
    (vlm, llm, shell.model_type)
    for shell in SHELLS.values()
    for vlm in shell.vlms + shell.adopts
    for llm in shell.llms
]


def last_layers(prefix: str, *names: str) -> set[str]:
    return {f"{prefix}{name}.{part}" for name in names for part in ("weight", "bias")}


QWEN3_MERGERS = last_layers(
    "model.visual.",
    "merger.linear_fc2",
    "deepstack_merger_list.0.linear_fc2",
    "deepstack_merger_list.1.linear_fc2",
)
PROJECTOR = last_layers("multi_modal_projector.", "linear_1", "linear_2")
FRESH = {
    "qwen3_vl": QWEN3_MERGERS,
    "qwen3_vl_moe": QWEN3_MERGERS,
    "qwen2_5_vl": last_layers("visual.merger.", "mlp.2"),
    "exaone4_5": last_layers("model.visual.merger.", "mlp.2"),
    "internvl": PROJECTOR,
    "llava": PROJECTOR,
    "llava_onevision": PROJECTOR | {"image_newline"},
}


@pytest.mark.parametrize(("vlm", "llm", "shell"), PAIRS, ids="-".join)
def test_another_width_out_of_hub_files_is_proven(
    tiny_model: Callable[..., Path], tmp_path: Path, vlm: str, llm: str, shell: str
) -> None:
    tied = llm in ("qwen2", "llama")
    donors = (
        as_hub(tiny_model(vlm), tmp_path / "vlm"),
        as_hub(tiny_model(llm, tied=tied, **OTHER), tmp_path / "llm"),
    )
    swap = Swap(*donors, tmp_path / "swapped", shell=shell)
    figures = swap.prove()
    assert figures["text_logits_max_diff"] == figures["vision_max_diff"] == 0.0
    assert figures["image_placeholders"] > 1
    assert set(swap.ledger.fresh) == FRESH[shell]
    check_against_architecture(swap.target)
    config = json.loads((swap.target / "config.json").read_text())
    assert config["model_type"] == shell
    assert config["tie_word_embeddings"] is tied
    rope = config["text_config"]["rope_parameters"]
    assert rope["rope_theta"] == 50_000.0


@pytest.mark.parametrize(
    ("vlm", "llm", "shell"),
    [pair for pair in PAIRS if pair[1] in ("qwen3", "qwen3_moe")],
    ids="-".join,
)
def test_the_same_width_keeps_every_vision_tensor(
    swapped: Swapped, vlm: str, llm: str, shell: str
) -> None:
    width = {"vlm_fields": {"hidden_size": 48, "head_dim": 16}}  # Qwen2.5-VL's own is 64
    swap = swapped(vlm, llm, shell=shell, **(width if vlm == "qwen2_5_vl" else {}))
    figures = swap.prove()
    assert figures["text_logits_max_diff"] == figures["vision_max_diff"] == 0.0
    assert not swap.ledger.fresh
    tensors, donor = swap.tensors(), load_file(swap.vlm / WEIGHTS)
    assert len(swap.ledger.from_vlm) > 20
    assert all(torch.equal(tensors[a], donor[b]) for a, b in swap.ledger.from_vlm.items())


@pytest.mark.parametrize("vlm_tied", [False, True], ids=["untied shell", "tied shell"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_llm_decides_whether_embeddings_are_tied(
    swapped: Swapped, tied: bool, vlm_tied: bool
) -> None:
    swap = swapped("qwen3_vl", "qwen3", tied=tied, vlm_fields={"tied": vlm_tied})
    swap.prove()
    assert ("lm_head.weight" in swap.tensors()) is not tied


def test_every_tensor_of_the_llm_moves_in(swapped: Swapped) -> None:
    swap = swapped("qwen3_vl", "qwen3", **OTHER)
    donor, tensors = load_file(swap.llm / WEIGHTS), swap.tensors()
    assert sorted(key for (key,) in swap.ledger.from_llm.values()) == sorted(donor)
    for home, (key,) in swap.ledger.from_llm.items():
        assert torch.equal(tensors[home], donor[key])
    assert set(tensors) == (
        set(swap.ledger.from_llm) | set(swap.ledger.from_vlm) | set(swap.ledger.fresh)
    )


def test_every_expert_moves_in_whatever_the_layouts(swapped: Swapped) -> None:
    swap = swapped("qwen3_vl", "qwen3_moe")
    donor, tensors = load_file(swap.llm / WEIGHTS), swap.tensors()
    assert {key for keys in swap.ledger.from_llm.values() for key in keys} == set(donor)
    home = "model.language_model.layers.1.mlp.experts."
    expert = "model.layers.1.mlp.experts.2."
    gate_up, down = tensors[f"{home}gate_up_proj"][2], tensors[f"{home}down_proj"][2]
    assert torch.equal(gate_up.T[:40], donor[f"{expert}gate_proj.weight"])
    assert torch.equal(gate_up.T[40:], donor[f"{expert}up_proj.weight"])
    assert torch.equal(down.T, donor[f"{expert}down_proj.weight"])


def test_fresh_tensors_are_drawn_and_explained(swapped: Swapped) -> None:
    swap = swapped("llava_onevision", "qwen2", **OTHER)
    assert swap.ledger.fresh["multi_modal_projector.linear_2.weight"] == (
        "shape (48, 48) in the vision donor, (60, 60) here"
    )
    tensors = swap.tensors()
    assert not tensors["multi_modal_projector.linear_1.bias"].any()
    assert 0.015 < float(tensors["multi_modal_projector.linear_1.weight"].std()) < 0.025
    assert 0.08 < float(tensors["image_newline"].std()) < 0.18  # 1 / √60 = 0.13
    assert len({float(tensors[key].flatten()[0]) for key in FRESH["llava_onevision"]}) == 4


def test_the_same_seed_draws_the_same_tensors(swapped: Swapped, tmp_path: Path) -> None:
    swap = swapped("qwen3_vl", "qwen3", **OTHER)
    swap_llm(swap.vlm, swap.llm, tmp_path / "again", seed=3)
    swap_llm(swap.vlm, swap.llm, tmp_path / "other", seed=4)
    weights = (swap.target / WEIGHTS).read_bytes()
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == weights
    assert (tmp_path / "other" / WEIGHTS).read_bytes() != weights


def test_the_config_is_the_shells_round_the_llms(swapped: Swapped) -> None:
    config = json.loads((swapped("qwen3_vl", "qwen3", **OTHER).target / "config.json").read_text())
    rope = config["text_config"]["rope_parameters"]
    assert rope["rope_theta"] == 50_000.0
    assert rope["mrope_section"] == [6, 2, 2]  # of 10 pairs; the shell's 8 pairs are [4, 2, 2]
    assert rope["mrope_interleaved"] is True
    assert config["text_config"]["model_type"] == "qwen3_vl_text"
    assert config["vision_config"]["out_hidden_size"] == 60
    assert config["text_config"]["num_hidden_layers"] == 4


def test_configs_of_transformers_4_are_read(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Qwen2.5-VL's published config is flat, and rope_theta stood at the top."""
    vlm = shutil.copytree(tiny_model("qwen2_5_vl"), tmp_path / "vlm")
    config = json.loads((vlm / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    config |= text | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    (vlm / "config.json").write_text(json.dumps(config | {"model_type": "qwen2_5_vl"}))
    llm = shutil.copytree(tiny_model("qwen2", **OTHER), tmp_path / "llm")
    config = json.loads((llm / "config.json").read_text())
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
    config["torch_dtype"] = config.pop("dtype")
    (llm / "config.json").write_text(json.dumps(config))
    swap = Swap(vlm, llm, tmp_path / "target")
    swap.prove()
    config = json.loads((swap.target / "config.json").read_text())
    assert config["text_config"]["rope_parameters"] == {
        "rope_type": "default",
        "rope_theta": 50_000.0,
        "mrope_section": [3, 1, 1],  # of 5 pairs; the shell's 8 are [2, 3, 3]
    }
    assert "rope_theta" not in config and "hidden_size" not in config


def test_llama3_frequencies_stay(swapped: Swapped) -> None:
    swap = swapped("internvl", "llama", rope_type="llama3")
    swap.prove()
    config = json.loads((swap.target / "config.json").read_text())
    assert config["text_config"]["rope_parameters"]["rope_type"] == "llama3"


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
    ("llm", "fields", "reason"),
    [
        ("qwen3", {"num_hidden_layers": 1}, "num_hidden_layers is 1, but the tower's 2 deepstack"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is False, but Qwen3VLMoe"),
    ],
)
def test_an_llm_that_the_shell_computes_otherwise_is_refused(
    swapped: Swapped, llm: str, fields: dict, reason: str
) -> None:
    with pytest.raises(WeightError, match=reason):
        swapped("qwen3_vl", llm, **fields)


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


def test_a_damaged_donor_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    llm = shutil.copytree(tiny_model("qwen3"), tmp_path / "llm")
    tensors = load_file(llm / WEIGHTS)
    del tensors["model.layers.1.self_attn.q_norm.weight"]
    save_file(tensors, llm / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(WeightError, match="model.layers.1.self_attn.q_norm.weight: missing"):
        swap_llm(tiny_model("qwen3_vl"), llm, tmp_path / "swapped", seed=0)


@pytest.mark.parametrize(
    ("key", "figure"),
    [
        ("model.language_model.layers.1.mlp.up_proj.weight", "text_logits_max_diff"),
        ("model.language_model.layers.0.self_attn.q_norm.weight", "text_logits_max_diff"),
        ("model.visual.blocks.1.mlp.linear_fc1.weight", "vision_max_diff"),
    ],
)
def test_one_changed_tensor_fails_the_proof(swapped: Swapped, key: str, figure: str) -> None:
    swap = swapped("qwen3_vl", "qwen3")
    tensors = swap.tensors()
    tensors[key] *= 1.01
    save_file(tensors, swap.target / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ProofError, match=f"{figure}: .*, expected 0.0"):
        swap.prove()


def test_a_lost_tensor_fails_the_proof(swapped: Swapped) -> None:
    swap = swapped("qwen3_vl", "qwen3")
    tensors = swap.tensors()
    del tensors["model.language_model.norm.weight"]
    save_file(tensors, swap.target / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ProofError, match=r"missing_keys: \['model.language_model.norm.weight'\]"):
        swap.prove()


def test_another_tower_than_the_donors_fails_the_proof(
    swapped: Swapped, tiny_model: Callable[..., Path]
) -> None:
    """A class that builds its own vision model, whatever the config says."""
    swap = swapped("llava_onevision", "qwen3")
    swap.vlm = tiny_model("llava")
    with pytest.raises(ProofError, match="vision_class: SiglipVisionModel, expected CLIPVision"):
        swap.prove()


@pytest.mark.parametrize(
    ("file", "old", "new", "figure"),
    [
        ("chat_template.jinja", "<|im_end|>", "<|im_end|> ", "text_renders_alike: False"),
        ("chat_template.jinja", "<|image_pad|>", "<|image_pad|> ", "image_renders_as_placeholder"),
        ("tokenizer.json", '"add_prefix_space": false', '"add_prefix_space": true', "tokenises"),
        ("config.json", '"rope_theta": 50000.0', '"rope_theta": 60000.0', "text_logits_max_diff"),
    ],
)
def test_a_changed_side_file_fails_the_proof(
    swapped: Swapped, file: str, old: str, new: str, figure: str
) -> None:
    swap = swapped("qwen3_vl", "qwen3", **OTHER)
    text = (swap.target / file).read_text()
    assert old in text
    (swap.target / file).write_text(text.replace(old, new))
    with pytest.raises(ProofError, match=figure):
        swap.prove()
