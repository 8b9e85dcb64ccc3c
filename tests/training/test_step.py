from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.step_figures import (
    EVERYWHERE,
    LORA,
    LORA_LLM,
    TWO,
    Cases,
    figures_of,
    names_of,
    require_adapted_layers_and_the_aligner_moved,
    require_only_the_aligner_moved,
    require_step,
)

TP = {"tensor_model_parallel_size": 2}
TP4 = {"tensor_model_parallel_size": 4}  # more ranks than kv heads
SP = TP | {"sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
PP4 = {"pipeline_model_parallel_size": 4}
VPP = PP | {"virtual_pipeline_model_parallel_size": 2}
CP = {"context_parallel_size": 2}
EP = {"expert_model_parallel_size": 2}
EP4 = {"expert_model_parallel_size": 4}
ETP = {"expert_tensor_parallel_size": 2}
FULL = {"recompute_granularity": "full"}
GROUPS = FULL | {"recompute_num_layers": 2, "vit_gradient_checkpointing": True}
BLOCK = FULL | {"recompute_method": "block", "recompute_num_layers": 1}
MOE_AGAIN = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}

# buckets of a few weights, so that many are under way while others are computed
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 2000}
GROUPED = {"moe_grouped_gemm": True, "moe_permute_fusion": True}
THREE = {"train_iters": 3}  # gradients are sent during backward from the second step on

CASES: Cases = {
    "dense": ("qwen3", {}, {
        "dp": {}, "tp4": TP4, "vpp": VPP, "pp4": PP4, "cp4": {"context_parallel_size": 4},
        "pp_cp": PP | CP,
    }),
    "deepstack": ("qwen3_vl", {}, {
        "dp": {}, "tp": TP, "sp_cp": SP | CP, "pp_sp_groups": PP | SP | GROUPS, "block": BLOCK,
        "cp_selective": CP | SELECTIVE,
    }),
    "windowed": ("qwen2_5_vl", {}, {"pp_cp": PP | CP}),
    "aligner": ("qwen3_vl", {"freeze_vit": True, "freeze_llm": True}, {
        "dp": {}, "sp_cp": SP | CP, "pp_groups": PP | GROUPS, "selective": SELECTIVE,
    }),
    "rates": ("qwen3_vl", {"vit_lr": 0.03, "aligner_lr": 0.2}, {"pp": PP}),
    "experts": ("qwen3_moe", {}, {
        "ep4": EP4, "etp": ETP, "sp_ep": SP | EP, "ep_etp": EP | ETP, "pp_ep": PP | EP,
        "vpp_ep_full": VPP | EP | FULL, "cp_ep": CP | EP,
        "grouped_ep_etp": GROUPED | EP | ETP, "grouped_overlap": GROUPED | OVERLAP,
    }),
    "routers": ("qwen3_moe", {"moe_aux_loss_coeff": 0.7, "moe_z_loss_coeff": 0.2}, {
        "dp": {}, "sp": SP, "cp_ep": CP | EP, "pp_ep_full": PP | EP | FULL,
    }),
    # two steps: at the first, the gradient of A is zero
    "lora": ("qwen3_moe", LORA, {"sp_ep": SP | EP, "pp_moe": GROUPED | PP | MOE_AGAIN}),
    "lora_everywhere": ("qwen3_vl", EVERYWHERE, {"dp": {}, "sp_cp": SP | CP}),
    "lora_llm": ("qwen3_vl", LORA_LLM, {"pp": PP, "selective": SELECTIVE}),
    # in rows of text alone the tower's weights get their gradients too
    "overlap": ("qwen3_vl", THREE, {
        "dp": OVERLAP, "pp": OVERLAP | PP, "sp_cp": OVERLAP | SP | CP, "again": OVERLAP | GROUPS,
        "reduce": {"overlap_grad_reduce": True},
    }),
    "overlap_tied": ("qwen3", THREE, {"vpp": OVERLAP | VPP, "dp": OVERLAP}),
    "overlap_experts": ("qwen3_moe", THREE, {"ep": OVERLAP | EP}),
    "overlap_lora": ("qwen3_vl", EVERYWHERE | THREE, {"dp": OVERLAP}),
    "overlap_inner": ("llava", THREE, {"dp": OVERLAP}),  # features of an inner layer
    "overlap_breaks": ("llava_onevision", THREE, {"dp": OVERLAP}),  # learned line breaks
    "resumed_overlap": ("qwen3_vl", TWO | {"killed_at": OVERLAP}, {"dp": OVERLAP, "tp": TP}),
    "resumed_tied": ("qwen3", TWO | {"killed_at": VPP}, {"vpp": VPP, "tp": TP, "dp": {}}),
    "resumed_rates": (
        "qwen3_vl", TWO | {"killed_at": SP, "vit_lr": 0.03, "freeze_aligner": True}, {"pp": PP},
    ),
    "resumed_experts": ("qwen3_moe", TWO | {"killed_at": EP}, {"ep4": EP4, "pp": PP, "sp": SP}),
    "resumed_lora": ("qwen3_moe", LORA | {"killed_at": PP | EP}, {"sp_ep": SP | EP}),
}  # fmt: skip
HALF = {"torch_dtype": "float16", "initial_loss_scale": 64.0, "moe_aux_loss_coeff": 0.7}
HALF_CASES: Cases = {"half": ("qwen3_moe", HALF, {"dp": {}, "ep": EP})}
NAMES = names_of(CASES)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Figures of every case, from one torchrun."""
    folder = tmp_path_factory.mktemp("steps")
    return figures_of(CASES | HALF_CASES, "tests.training.step_cases", tiny_model, folder, ranks=4)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_equals_transformers_and_adamw(results: Any, name: str) -> None:
    """Packed rows against samples alone, uneven over ranks, with clipping at work."""
    require_step(results[name])


@pytest.mark.parametrize("name", names_of(HALF_CASES))
def test_a_step_in_float16_follows_it_with_experts(results: Any, name: str) -> None:
    """Tolerances: a few roundings to 11 bits, each of 5e-4 at most."""
    figures = results[name]
    assert figures["clipped"]
    assert figures["loss"] <= 1e-3
    assert figures["grad_norm"] <= 1e-3
    assert figures["worst"][1] <= 2e-3, figures["worst"]
    assert len(figures["moved"]) == figures["keys"]


@pytest.mark.parametrize("layout", CASES["aligner"][2])
def test_frozen_groups_stay_bit_identical_and_the_aligner_moves(results: Any, layout: str) -> None:
    require_only_the_aligner_moved(results[f"aligner {layout}"]["moved"])


@pytest.mark.parametrize("layout", CASES["lora_llm"][2])
def test_beside_adapters_only_the_aligner_moves(results: Any, layout: str) -> None:
    require_adapted_layers_and_the_aligner_moved(results[f"lora_llm {layout}"]["moved"])


WHOLE = [n for n in NAMES if n.split()[0] in ("dense", "deepstack", "windowed", "experts")]


@pytest.mark.parametrize("name", WHOLE)
def test_everything_moves_where_nothing_is_frozen(results: Any, name: str) -> None:
    assert len(results[name]["moved"]) == results[name]["keys"]


@pytest.mark.parametrize("layout", CASES["routers"][2])
def test_the_routers_losses_are_logged_alike_at_every_layout(results: Any, layout: str) -> None:
    found, expected = (results[f"routers {name}"]["logged"] for name in (layout, "dp"))
    assert found.keys() == {"aux_loss", "z_loss"}
    assert found["aux_loss"] == pytest.approx(expected["aux_loss"], rel=1e-5)
    assert found["aux_loss"] >= 0.9  # 1 where experts are chosen evenly
