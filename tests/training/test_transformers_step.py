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

DDP: dict[str, Any] = {}
FSDP = {"fsdp": "fsdp2"}
ZERO2, ZERO3 = {"deepspeed": "zero2"}, {"deepspeed": "zero3"}
AGAIN = {"recompute_granularity": "full", "vit_gradient_checkpointing": True}
CHUNKS = {"max_length": 9000}  # many chunks of logits

BF16 = {"torch_dtype": "bfloat16"}

CASES: Cases = {
    "dense": ("qwen3", TWO, {"ddp": DDP, "fsdp": FSDP, "zero2": ZERO2, "zero3": ZERO3}),
    "deepstack": ("qwen3_vl", TWO, {
        "ddp": DDP, "fsdp_again": FSDP | AGAIN, "zero2": ZERO2, "zero3_again": ZERO3 | AGAIN,
        "ddp_chunks": AGAIN | CHUNKS,
    }),
    "windowed": ("qwen2_5_vl", {}, {"ddp": DDP}),
    "tiles": ("internvl", {}, {"ddp": DDP}),
    "inner": ("llava", {}, {"ddp": DDP, "fsdp": FSDP}),  # features of an inner layer
    "breaks": ("llava_onevision", {}, {"ddp": DDP}),  # learned line breaks
    "aligner": ("qwen3_vl", {"freeze_vit": True, "freeze_llm": True}, {
        "ddp": DDP, "fsdp": FSDP, "zero2": ZERO2, "zero3": ZERO3,
    }),
    "offload": ("qwen3", {}, {
        "zero2": {"deepspeed": "zero2_offload"}, "zero3": {"deepspeed": "zero3_offload"},
    }),
    "rates": ("qwen3_vl", {"vit_lr": 0.03, "aligner_lr": 0.2}, {"ddp": DDP, "zero2": ZERO2}),
    "experts": ("qwen3_moe", {}, {"ddp": DDP, "fsdp": FSDP, "zero2": ZERO2, "zero3": ZERO3}),
    "routers": ("qwen3_moe", {"moe_aux_loss_coeff": 0.7, "moe_z_loss_coeff": 0.2}, {
        "ddp": DDP, "fsdp_again": FSDP | AGAIN,
    }),
    "lora": ("qwen3_moe", LORA, {"ddp": DDP, "fsdp": FSDP, "zero2": ZERO2}),
    "lora_everywhere": ("qwen3_vl", EVERYWHERE, {
        "ddp": DDP, "zero3": ZERO3, "zero3_again": ZERO3 | {"recompute_granularity": "full"},
    }),
    "lora_llm": ("qwen3_vl", LORA_LLM, {"ddp": DDP, "fsdp": FSDP}),
    "dora": ("qwen3_vl", LORA | {"tuner_type": "dora"}, {"ddp": DDP, "fsdp": FSDP, "zero3": ZERO3}),
    "resumed": ("qwen3_vl", TWO | {"killed_at": DDP, "vit_lr": 0.03}, {"ddp": DDP, "fsdp": FSDP}),
    "resumed_fsdp": ("qwen3_moe", TWO | {"killed_at": FSDP}, {"fsdp": FSDP, "ddp": DDP}),
    "resumed_zero2": ("qwen3_vl", TWO | {"killed_at": ZERO2}, {"zero2": ZERO2}),
    "resumed_zero3": ("qwen3", TWO | {"killed_at": ZERO3}, {"zero3": ZERO3}),
    "resumed_lora": ("qwen3_vl", LORA | {"killed_at": DDP}, {"ddp": DDP}),
}  # fmt: skip
HALF = {"ddp": DDP, "fsdp": FSDP, "zero2": ZERO2, "zero3": ZERO3}
NAMES = names_of(CASES)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Figures of every case, from one torchrun."""
    folder = tmp_path_factory.mktemp("steps")
    return figures_of(
        {**CASES, "half": ("qwen3_vl", BF16, HALF)},
        "tests.training.transformers_cases",
        tiny_model,
        folder,
        ranks=2,
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_step_equals_transformers_and_adamw(results: Any, name: str) -> None:
    """Packed rows against samples alone, uneven over ranks, with clipping at work."""
    require_step(results[name])


@pytest.mark.parametrize("layout", CASES["aligner"][2])
def test_frozen_groups_stay_bit_identical_and_the_aligner_moves(results: Any, layout: str) -> None:
    require_only_the_aligner_moved(results[f"aligner {layout}"]["moved"])


@pytest.mark.parametrize("layout", CASES["lora_llm"][2])
def test_beside_adapters_only_the_aligner_moves(results: Any, layout: str) -> None:
    require_adapted_layers_and_the_aligner_moved(results[f"lora_llm {layout}"]["moved"])


@pytest.mark.parametrize("name", [n for n in NAMES if n.split()[0] in ("deepstack", "experts")])
def test_everything_moves_where_nothing_is_frozen(results: Any, name: str) -> None:
    assert len(results[name]["moved"]) == results[name]["keys"]


@pytest.mark.parametrize("layout", HALF)
def test_bfloat16_stays_near_float32(results: Any, layout: str) -> None:
    figures = results[f"half {layout}"]
    assert 0 < figures["loss"] <= 0.02  # of about 6: bfloat16 keeps 8 bits
    assert figures["grad_norm"] <= 0.02
    assert len(figures["moved"]) >= 0.9 * figures["keys"]


def test_the_routers_losses_are_logged(results: Any) -> None:
    found, again = (results[f"routers {name}"]["logged"] for name in ("ddp", "fsdp_again"))
    assert found["aux_loss"] >= 0.9  # 1 where experts are chosen evenly
    assert again == pytest.approx(found, rel=1e-5)
