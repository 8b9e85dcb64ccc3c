"""What every family owes; a new one gets these tests by its name in FAMILIES and a tiny model."""

import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fixtures.real import real_model, real_model_names
from tests.tiny.forms import as_hub, as_memory
from tests.tiny.models import BUILDERS
from vlmcore.errors import WeightError
from vlmcore.families import FAMILIES, family_of, read_config
from vlmcore.weights.architecture import architecture_shapes, published_shapes
from vlmcore.weights.convert import to_hf, to_mcore
from vlmcore.weights.plan import build_plan

MODELS: list[tuple[str, dict[str, object]]] = [
    *((name, {"tied": tied}) for name in sorted(FAMILIES) for tied in (False, True)),
    *(("internvl", {"text_type": text}) for text in ("qwen2", "qwen3_moe")),
    ("exaone4_5", {"text_type": "qwen2"}),
    ("llava", {"text_type": "qwen3_moe"}),
    ("llava_onevision", {"text_type": "qwen3"}),
]
IDS = ["-".join([name, *(f"{k}={v}" for k, v in options.items())]) for name, options in MODELS]
FORMS = {"hub": as_hub, "memory": as_memory}
WEIGHTS = "model.safetensors"

Shapes = dict[str, tuple[int, ...]]


@pytest.fixture(params=MODELS, ids=IDS)
def model_dir(request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Path:
    name, options = request.param
    return tiny_model(name, **options)


def stored_shapes(model_dir: Path) -> Shapes:
    return {key: tuple(tensor.shape) for key, tensor in load_file(model_dir / WEIGHTS).items()}


def tensors_in_memory(model_dir: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """The tensors as transformers holds them after loading, whatever form they are stored in."""
    return load_file(as_memory(model_dir, scratch) / WEIGHTS)


def layer_keys(keys: Iterable[str], model_dir: Path) -> list[str]:
    """Keys of the decoder's last layer, as they are stored."""
    config = read_config(model_dir)
    family = family_of(config)
    last = family.language_model(config).num_layers - 1
    prefix = f"{family.text_hf_prefix}layers.{last}."
    return sorted(key for key in keys if family.memory_key(key).startswith(prefix))


def test_every_family_has_a_tiny_model_and_real_shapes() -> None:
    assert set(FAMILIES) <= set(BUILDERS)
    real = {real_model(name).config["model_type"] for name in real_model_names()}
    assert set(FAMILIES) <= real


@pytest.mark.parametrize("form", ["saved", "hub", "memory"])
def test_the_round_trip_is_bit_exact_from_every_form(
    model_dir: Path, tmp_path: Path, form: str
) -> None:
    source = FORMS[form](model_dir, tmp_path / "source") if form in FORMS else model_dir
    there = to_mcore(source, tmp_path / "mcore")
    back = to_hf(tmp_path / "mcore", tmp_path / "hf")
    expected = tensors_in_memory(source, tmp_path / "expected")
    found = tensors_in_memory(tmp_path / "hf", tmp_path / "found")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert {box for box in {*back["boxes"]} ^ {*there["boxes"]} if ".experts." not in box} == set()
    assert all(there["boxes"][b] == back["boxes"][b] for b in {*back["boxes"]} & {*there["boxes"]})
    if form == "hub":
        assert back["boxes"] == there["boxes"]
        assert back["tensors"] == there["tensors"]
        assert stored_shapes(tmp_path / "hf") == stored_shapes(source)
    assert read_config(tmp_path / "hf") == read_config(model_dir)
    tokenizer = (tmp_path / "hf" / "tokenizer.json").read_bytes()
    assert tokenizer == (model_dir / "tokenizer.json").read_bytes()


def test_the_published_form_is_what_hubs_hold(model_dir: Path, tmp_path: Path) -> None:
    assert published_shapes(model_dir) == stored_shapes(as_hub(model_dir, tmp_path / "hub"))


def test_the_architecture_agrees_with_transformers(model_dir: Path, tmp_path: Path) -> None:
    assert architecture_shapes(model_dir) == stored_shapes(as_memory(model_dir, tmp_path / "form"))


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


def cut_the_vision_side(shapes: Shapes, layer: list[str]) -> str:
    key = sorted(key for key in shapes if "visual" in key or "vision_tower" in key)[-1]
    shapes[key] = (shapes[key][0] + 1, *shapes[key][1:])
    return key


FAULTS = [add_a_key, lose_a_key, cut_a_tensor, lose_a_layer]


@pytest.mark.parametrize("fault", [*FAULTS, cut_the_vision_side])
def test_a_faulty_checkpoint_is_refused_and_the_tensor_named(
    model_dir: Path, tmp_path: Path, fault: Callable[[Shapes, list[str]], str]
) -> None:
    shapes = stored_shapes(model_dir)
    if fault is cut_the_vision_side and family_of(read_config(model_dir)).vision is None:
        pytest.skip("a family without a vision side")
    named = fault(shapes, layer_keys(shapes, model_dir))
    copy = shutil.copytree(model_dir, tmp_path / "faulty")
    tensors = {key: torch.ones(shape) for key, shape in shapes.items()}
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(WeightError) as refusal:
        to_mcore(copy, tmp_path / "mcore")
    assert named in str(refusal.value)
    assert not (tmp_path / "mcore").exists()


@pytest.mark.parametrize("fault", FAULTS)
def test_the_weight_map_itself_accounts_for_every_tensor(
    model_dir: Path, fault: Callable[[Shapes, list[str]], str]
) -> None:
    config = read_config(model_dir)
    shapes = architecture_shapes(model_dir)
    plan = build_plan(family_of(config), config, shapes)
    mapped = {source.key for region in plan.regions for source in region.sources}
    assert mapped == set(shapes)
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


@pytest.mark.parametrize("name", real_model_names())
def test_real_checkpoints_are_accounted_for(name: str) -> None:
    """At real sizes, from hub and from memory: the same global tensors, nothing left over."""
    real = real_model(name)
    family = family_of(real.config)
    assert family.language_model(real.config) == family.language_model(real.saved_config)
    plans = [build_plan(family, real.config, shapes) for shapes in (real.hub, real.memory)]
    targets = [{r.mcore_key: r.global_shape for r in plan.regions} for plan in plans]
    assert targets[0] == targets[1]
    for plan, shapes in zip(plans, (real.hub, real.memory), strict=True):
        moved = sum(math.prod(region.shape) for region in plan.regions)
        assert moved == sum(math.prod(shape) for shape in shapes.values())
    assert {family.disk_key(key) for key in real.memory if ".experts." not in key} == {
        key for key in real.hub if ".experts." not in key
    }


def test_freeze_groups_are_disjoint_and_cover_every_key(model_dir: Path) -> None:
    family = family_of(read_config(model_dir))
    groups = {key: family.group_of(key) for key in architecture_shapes(model_dir)}
    assert set(groups.values()) == set(family.groups)
    prefixes = [prefix for owned in family.groups.values() for prefix in owned]
    assert len(prefixes) == len(set(prefixes))
    text = {key for key in groups if key.startswith((family.text_hf_prefix, "lm_head."))}
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
    if model.moe is None:
        assert shapes[f"{prefix}layers.0.mlp.up_proj.weight"] == (model.ffn_hidden_size, hidden)
    else:
        experts = (model.moe.num_experts, hidden, model.moe.ffn_hidden_size)
        assert shapes[f"{prefix}layers.0.mlp.experts.down_proj"] == experts
    assert (f"{attention}q_norm.weight" in shapes) == model.qk_layernorm
    assert (f"{attention}q_proj.bias" in shapes) == model.add_qkv_bias
    assert ("lm_head.weight" in shapes) == (not model.tied_embeddings)
    assert sum(model.mrope_section) == dim // 2
    assert set(range(model.num_layers)) == {
        int(key.removeprefix(f"{prefix}layers.").split(".")[0])
        for key in shapes
        if key.startswith(f"{prefix}layers.")
    }
