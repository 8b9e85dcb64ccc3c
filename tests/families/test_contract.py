"""What every family owes; a new one gets these tests by its name in FAMILIES and a tiny model."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny.models import BUILDERS
from vlmcore.errors import WeightError
from vlmcore.families import FAMILIES, family_of, read_config
from vlmcore.training.launch import launch
from vlmcore.weights.architecture import architecture_shapes
from vlmcore.weights.convert import to_hf, to_mcore
from vlmcore.weights.plan import build_plan

MODELS = [(name, tied) for name in sorted(FAMILIES) for tied in (False, True)]
IDS = [f"{name}-{'tied' if tied else 'untied'}" for name, tied in MODELS]
LAYOUTS = (1, 2)
WEIGHTS = "model.safetensors"

Shapes = dict[str, tuple[int, ...]]


@pytest.fixture(params=MODELS, ids=IDS)
def model_dir(request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Path:
    name, tied = request.param
    return tiny_model(name, tied=tied)


def digests(model_dir: Path) -> dict[str, str]:
    return {
        key: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
        for key, tensor in load_file(model_dir / WEIGHTS).items()
    }


def layer_keys(keys: list[str] | Shapes, model_dir: Path) -> list[str]:
    """Keys of the decoder's last layer."""
    config = read_config(model_dir)
    family = family_of(config)
    last = family.language_model(config).num_layers - 1
    return sorted(key for key in keys if key.startswith(f"{family.text_hf_prefix}layers.{last}."))


def test_every_family_has_a_tiny_model() -> None:
    assert set(FAMILIES) <= set(BUILDERS)


def test_the_round_trip_is_bit_exact(model_dir: Path, tmp_path: Path) -> None:
    there = to_mcore(model_dir, tmp_path / "mcore")
    back = to_hf(tmp_path / "mcore", tmp_path / "hf")
    assert digests(tmp_path / "hf") == digests(model_dir)
    assert back["tensors"] == there["tensors"] == digests(model_dir)
    assert read_config(tmp_path / "hf") == read_config(model_dir)
    tokenizer = (tmp_path / "hf" / "tokenizer.json").read_bytes()
    assert tokenizer == (model_dir / "tokenizer.json").read_bytes()


def test_the_architecture_agrees_with_what_transformers_saved(model_dir: Path) -> None:
    saved = {key: tuple(tensor.shape) for key, tensor in load_file(model_dir / WEIGHTS).items()}
    assert architecture_shapes(model_dir) == saved


def add_a_key(shapes: Shapes, layer: list[str]) -> str:
    shapes["model.stray.weight"] = (4, 4)
    return "model.stray.weight"


def lose_a_key(shapes: Shapes, layer: list[str]) -> str:
    del shapes[layer[-1]]
    return layer[-1]


def cut_a_tensor(shapes: Shapes, layer: list[str]) -> str:
    (key,) = (key for key in layer if key.endswith("v_proj.weight"))
    shapes[key] = (shapes[key][0] - 1, *shapes[key][1:])
    return key


def lose_a_layer(shapes: Shapes, layer: list[str]) -> str:
    for key in layer:
        del shapes[key]
    return layer[0]


@pytest.mark.parametrize("fault", [add_a_key, lose_a_key, cut_a_tensor, lose_a_layer])
def test_a_faulty_checkpoint_is_refused_and_the_tensor_named(
    model_dir: Path, tmp_path: Path, fault: Callable[[Shapes, list[str]], str]
) -> None:
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(model_dir / WEIGHTS).items()}
    named = fault(shapes, layer_keys(shapes, model_dir))
    copy = shutil.copytree(model_dir, tmp_path / "faulty")
    tensors = {key: torch.ones(shape) for key, shape in shapes.items()}
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(WeightError) as refusal:
        to_mcore(copy, tmp_path / "mcore")
    assert f"{named}: " in str(refusal.value)
    assert not (tmp_path / "mcore").exists()


@pytest.mark.parametrize("fault", [add_a_key, lose_a_key, cut_a_tensor, lose_a_layer])
def test_the_weight_map_itself_accounts_for_every_tensor(
    model_dir: Path, fault: Callable[[Shapes, list[str]], str]
) -> None:
    config = read_config(model_dir)
    shapes = architecture_shapes(model_dir)
    plan = build_plan(family_of(config), config, shapes)
    mapped = [key for region in plan.regions for key in region.hf_keys]
    assert sorted(mapped) == sorted(shapes)
    fault(shapes, layer_keys(shapes, model_dir))
    with pytest.raises(WeightError, match="in the weight map of this checkpoint"):
        build_plan(family_of(config), config, shapes)


def test_the_weight_map_misses_what_no_layer_has(model_dir: Path) -> None:
    config = read_config(model_dir)
    shapes = architecture_shapes(model_dir)
    gone = {key for key in shapes if key.endswith("o_proj.weight")}
    with pytest.raises(WeightError, match=r"o_proj\.weight"):
        build_plan(
            family_of(config), config, {key: shapes[key] for key in shapes if key not in gone}
        )


def test_freeze_groups_are_disjoint_and_cover_every_key(model_dir: Path) -> None:
    family = family_of(read_config(model_dir))
    groups = {key: family.group_of(key) for key in architecture_shapes(model_dir)}
    assert set(groups.values()) == set(family.groups)
    prefixes = [prefix for owned in family.groups.values() for prefix in owned]
    assert len(prefixes) == len(set(prefixes))
    text = {key for key in groups if key.startswith((family.text_hf_prefix, "lm_head."))}
    if family.vision is not None:
        text -= {key for key in groups if key.startswith(family.vision.hf_prefix)}
    assert {key for key, group in groups.items() if group == "llm"} == text
    with pytest.raises(ValueError, match="belongs to no freeze group"):
        family.group_of("nowhere.weight")


def test_the_decoder_shape_agrees_with_the_architecture(model_dir: Path) -> None:
    config = read_config(model_dir)
    family = family_of(config)
    shapes = architecture_shapes(model_dir)
    model = family.language_model(config)
    prefix = family.text_hf_prefix
    attention = f"{prefix}layers.0.self_attn."
    hidden, dim = model.hidden_size, model.kv_channels
    assert shapes[f"{prefix}embed_tokens.weight"] == (model.vocab_size, hidden)
    assert shapes[f"{attention}q_proj.weight"] == (model.num_attention_heads * dim, hidden)
    assert shapes[f"{attention}k_proj.weight"] == (model.num_query_groups * dim, hidden)
    assert shapes[f"{prefix}layers.0.mlp.up_proj.weight"] == (model.ffn_hidden_size, hidden)
    assert (f"{attention}q_norm.weight" in shapes) == model.qk_layernorm
    assert (f"{attention}q_proj.bias" in shapes) == model.add_qkv_bias
    assert ("lm_head.weight" in shapes) == (not model.tied_embeddings)
    assert sum(model.mrope_section) == dim // 2
    layers = {
        int(key.removeprefix(f"{prefix}layers.").split(".")[0])
        for key in shapes
        if key.startswith(f"{prefix}layers.")
    }
    assert layers == set(range(model.num_layers))


@pytest.mark.slow
def test_megatron_computes_what_transformers_computes(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    pairs = {}
    for (name, tied), case in zip(MODELS, IDS, strict=True):
        to_mcore(tiny_model(name, tied=tied), tmp_path / case)
        pairs[case] = (str(tiny_model(name, tied=tied)), str(tmp_path / case))
    other = pairs[IDS[0]][1]
    pairs["weights of another seed"] = (str(tiny_model(MODELS[0][0], seed=7)), other)
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    launch(
        "tests.families.parity",
        [str(tmp_path / "pairs.json"), str(tmp_path / "out.json"), *map(str, LAYOUTS)],
        nproc_per_node=max(LAYOUTS),
        log_path=tmp_path / "log",
    )
    out = json.loads((tmp_path / "out.json").read_text())
    assert not any(row["passed"] for row in out.pop("weights of another seed"))
    for case, rows in out.items():
        assert {row["tensor_model_parallel_size"] for row in rows} == set(LAYOUTS)
        assert max(row["max_diff"] for row in rows) <= 1e-5, (case, rows)
        vision = FAMILIES[MODELS[IDS.index(case)][0]].vision is not None
        assert ("two images" in {row["sample"] for row in rows}) == vision
