from dataclasses import replace

import pytest

from vlmcore.errors import WeightError
from vlmcore.families import FAMILIES, Family
from vlmcore.families.rows import Drop, Rename, Row
from vlmcore.weights.plan import build_plan

CONFIG = {
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "vocab_size": 30,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
LAYER = {
    "self_attn.q_proj.weight": (24, 12),
    "self_attn.k_proj.weight": (12, 12),
    "self_attn.v_proj.weight": (12, 12),
    "self_attn.o_proj.weight": (12, 24),
    "self_attn.q_norm.weight": (6,),
    "self_attn.k_norm.weight": (6,),
    "mlp.gate_proj.weight": (20, 12),
    "mlp.up_proj.weight": (20, 12),
    "mlp.down_proj.weight": (12, 20),
    "input_layernorm.weight": (12,),
    "post_attention_layernorm.weight": (12,),
}
FC1 = "decoder.layers.mlp.linear_fc1.weight"


@pytest.fixture
def shapes() -> dict:
    layers = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in LAYER.items()}
    outside = {
        "model.embed_tokens.weight": (30, 12),
        "model.norm.weight": (12,),
        "lm_head.weight": (30, 12),
    }
    return layers | outside


@pytest.fixture
def family() -> Family:
    return FAMILIES["qwen3"]


def with_row(family: Family, row: Row) -> Family:
    return replace(family, rows=lambda config: (*family.rows(config), row))


def faults_of(family: Family, shapes: dict, **config: object) -> str:
    with pytest.raises(WeightError) as refusal:
        build_plan(family, CONFIG | config, shapes)
    return str(refusal.value)


def test_gate_and_up_are_two_boxes_of_one_tensor(family: Family, shapes: dict) -> None:
    plan = build_plan(family, CONFIG, shapes)
    boxes = {
        region.sources[0].key: (region.offset, region.shape, region.global_shape)
        for region in plan.regions
        if region.mcore_key == FC1
    }
    assert boxes["model.layers.1.mlp.gate_proj.weight"] == ((1, 0, 0), (1, 20, 12), (2, 40, 12))
    assert boxes["model.layers.1.mlp.up_proj.weight"] == ((1, 20, 0), (1, 20, 12), (2, 40, 12))


def test_every_fault_is_in_one_message(family: Family, shapes: dict) -> None:
    del shapes["model.layers.0.mlp.up_proj.weight"]
    del shapes["model.norm.weight"]
    shapes["model.stray"] = (1,)
    shapes["model.layers.1.self_attn.k_proj.weight"] = (24, 12)
    message = faults_of(family, shapes)
    for fault in (
        "model.layers.0.mlp.up_proj.weight: missing, though model.layers.0.mlp.gate_proj.weight",
        "model.norm.weight: the checkpoint has no such tensor",
        "model.stray: no row maps it",
        "4 heads, 2 kv heads, head dim 6",
    ):
        assert fault in message


def test_a_layer_more_than_the_config_says_is_refused(family: Family, shapes: dict) -> None:
    assert "elements have a source" in faults_of(family, shapes, num_hidden_layers=1)


def test_a_layer_less_than_the_config_says_is_refused(family: Family, shapes: dict) -> None:
    assert "elements have a source" in faults_of(family, shapes, num_hidden_layers=3)


def test_layers_of_different_width_are_refused(family: Family, shapes: dict) -> None:
    for half in ("gate", "up"):
        shapes[f"model.layers.1.mlp.{half}_proj.weight"] = (21, 12)
    assert f"{FC1}: layers disagree on its shape" in faults_of(family, shapes)


def test_gate_and_up_of_different_shape_are_refused(family: Family, shapes: dict) -> None:
    shapes["model.layers.1.mlp.gate_proj.weight"] = (21, 12)
    assert "model.layers.1.mlp.gate_proj.weight: shape (21, 12), but" in faults_of(family, shapes)


def test_a_key_that_two_rows_claim_is_refused(family: Family, shapes: dict) -> None:
    twice = with_row(family, Rename("model.norm.weight", "decoder.other"))
    assert "model.norm.weight: 2 rows map it; expected one" in faults_of(twice, shapes)


def test_two_rows_that_write_one_tensor_are_refused(family: Family, shapes: dict) -> None:
    shapes["model.other.weight"] = (12,)
    row = Rename("model.other.weight", "decoder.final_layernorm.weight")
    clash = with_row(family, row)
    assert "decoder.final_layernorm.weight: written twice" in faults_of(clash, shapes)


def test_a_dropped_key_is_listed_with_its_reason(family: Family, shapes: dict) -> None:
    shapes["model.rotary.inv_freq"] = (3,)
    row = Drop("model.rotary.inv_freq", reason="computed from rope_theta")
    plan = build_plan(with_row(family, row), CONFIG, shapes)
    assert plan.dropped == {"model.rotary.inv_freq": "computed from rope_theta"}


def test_a_stored_repetition_of_tied_embeddings_is_no_tensor_of_its_own(
    family: Family, shapes: dict
) -> None:
    tied = build_plan(family, CONFIG | {"tie_word_embeddings": True}, shapes)
    assert tied.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "output_layer.weight" not in {region.mcore_key for region in tied.regions}
