import pytest

from vlmcore.errors import WeightError
from vlmcore.families import FAMILIES, MixtureOfExperts
from vlmcore.weights.experts import experts_layout, fused_shapes, per_expert_shapes
from vlmcore.weights.plan import Plan, Source, build_plan

PREFIX = "model.layers.0.mlp.experts."
CONFIG = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 1,
    "hidden_size": 12,
    "intermediate_size": 40,
    "moe_intermediate_size": 10,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "vocab_size": 30,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
OTHERS = {
    "model.embed_tokens.weight": (30, 12),
    "model.norm.weight": (12,),
    "lm_head.weight": (30, 12),
    "model.layers.0.self_attn.q_proj.weight": (24, 12),
    "model.layers.0.self_attn.k_proj.weight": (12, 12),
    "model.layers.0.self_attn.v_proj.weight": (12, 12),
    "model.layers.0.self_attn.o_proj.weight": (12, 24),
    "model.layers.0.self_attn.q_norm.weight": (6,),
    "model.layers.0.self_attn.k_norm.weight": (6,),
    "model.layers.0.mlp.gate.weight": (3, 12),
    "model.layers.0.input_layernorm.weight": (12,),
    "model.layers.0.post_attention_layernorm.weight": (12,),
}
FC1 = "decoder.layers.mlp.experts.experts.linear_fc1.weight"


def moe(size: int) -> MixtureOfExperts:
    return MixtureOfExperts(num_experts=3, top_k=2, ffn_hidden_size=size, norm_topk_prob=True)


def layout(found: dict, *, size: int, hidden: int):
    return experts_layout(PREFIX, found, moe=moe(size), hidden_size=hidden, name=lambda key: key)


def plan(experts: dict) -> Plan:
    return build_plan(FAMILIES["qwen3_moe"], CONFIG, OTHERS | experts)


# hidden = 2 · size makes gate_up square, hidden = size makes down square: the other one decides
@pytest.mark.parametrize(("size", "hidden"), [(10, 12), (6, 12), (12, 12), (5, 12)])
@pytest.mark.parametrize("input_first", [False, True])
def test_the_two_fused_tensors_together_always_decide(
    size: int, hidden: int, input_first: bool
) -> None:
    found = fused_shapes(PREFIX, moe(size), hidden, input_first=input_first)
    told = layout(found, size=size, hidden=hidden)
    assert (told.faults, told.per_expert, told.input_first) == ((), False, input_first)


def test_one_fused_tensor_turned_and_the_other_not_is_refused() -> None:
    straight = fused_shapes(PREFIX, moe(10), 12, input_first=False)
    turned = fused_shapes(PREFIX, moe(10), 12, input_first=True)
    mixed = straight | {f"{PREFIX}down_proj": turned[f"{PREFIX}down_proj"]}
    assert layout(mixed, size=10, hidden=12).faults == (
        f"{PREFIX}down_proj: shape (3, 10, 12), expected (3, 12, 10), or (3, 10, 12) with the "
        f"input dimension first",
    )


def test_every_layout_fills_the_same_global_tensors() -> None:
    layouts = [
        per_expert_shapes(PREFIX, moe(10), 12),
        fused_shapes(PREFIX, moe(10), 12, input_first=False),
        fused_shapes(PREFIX, moe(10), 12, input_first=True),
    ]
    tensors = [{r.mcore_key: r.global_shape for r in plan(found).regions} for found in layouts]
    assert tensors[0] == tensors[1] == tensors[2]
    assert tensors[0][FC1] == (1, 3, 20, 12)


def test_a_fused_tensor_is_cut_at_each_expert_and_moved_by_one_worker() -> None:
    built = plan(fused_shapes(PREFIX, moe(10), 12, input_first=True))
    (unit,) = (u for u in built.units if u.hf_keys == (f"{PREFIX}gate_up_proj",))
    assert [r.sources for r in unit.regions] == [
        (Source(f"{PREFIX}gate_up_proj", i),) for i in range(3)
    ]
    assert [r.offset for r in unit.regions] == [(0, i, 0, 0) for i in range(3)]
    assert not any(region.is_copy for region in unit.regions)


def lose_an_expert(found: dict) -> None:
    for name in ("gate", "up", "down"):
        del found[f"{PREFIX}2.{name}_proj.weight"]


def add_an_expert(found: dict) -> None:
    found[f"{PREFIX}3.gate_proj.weight"] = (10, 12)


def cut_an_expert(found: dict) -> None:
    found[f"{PREFIX}1.down_proj.weight"] = (12, 9)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lose_an_expert, f"{PREFIX}2.up_proj.weight: missing, expected (10, 12)"),
        (add_an_expert, f"{PREFIX}3.gate_proj.weight: no such expert"),
        (cut_an_expert, f"{PREFIX}1.down_proj.weight: shape (12, 9), expected (12, 10)"),
    ],
)
def test_a_faulty_expert_is_named(change, fault: str) -> None:
    found = per_expert_shapes(PREFIX, moe(10), 12)
    change(found)
    with pytest.raises(WeightError) as refusal:
        plan(found)
    assert fault in str(refusal.value)


def test_too_few_experts_in_a_fused_tensor_are_refused() -> None:
    found = fused_shapes(PREFIX, moe(10), 12, input_first=False)
    found[f"{PREFIX}down_proj"] = (2, 12, 10)
    with pytest.raises(
        WeightError, match=r"down_proj: shape \(2, 12, 10\), expected \(3, 12, 10\)"
    ):
        plan(found)
