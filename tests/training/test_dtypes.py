"""bf16 and fp16 beside fp32 on two ranks, over a restart in the middle."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmcore.training.launch import launch

HYPER = {"learning_rate": 3e-3, "lr_decay_style": "linear"}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 2000}
FP16 = HYPER | {"torch_dtype": "float16"}
TOO_LARGE = 2.0**11
STEADY = FP16 | {"initial_loss_scale": 64.0, "hysteresis": 1}
OVERFLOWS = FP16 | {"initial_loss_scale": TOO_LARGE, "hysteresis": 2}
GROWS = FP16 | {"initial_loss_scale": 2.0, "loss_scale_window": 2}
EP = {"expert_model_parallel_size": 2}
DENSE = {
    "fp32": HYPER,
    "bf16": HYPER | {"torch_dtype": "bfloat16"} | OVERLAP,
    "fp16": STEADY,
    "fp16_overflows": OVERFLOWS,
    "fp16_grows": GROWS,
    "offload": HYPER | {"torch_dtype": "bfloat16", "optimizer_cpu_offload": True},
}
EXPERTS = {
    "experts_fp32": HYPER,
    "experts_fp16": STEADY,
    "experts_fp16_ep": STEADY | EP,
    "experts_overflow": OVERFLOWS | EP,
    "experts_grow": GROWS | EP,
    "one_expert_overflows": STEADY,
    "one_expert_overflows_ep": STEADY | EP,
}
OVERFLOW_AT = 3  # the last step before the restart

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("dtypes")
    cases = {
        name: {
            "hf": str(tiny_model("qwen3_vl_moe" if name in EXPERTS else "qwen3_vl")),
            "fields": fields,
            "overflow_at": OVERFLOW_AT if name.startswith("one_expert") else None,
        }
        for name, fields in (DENSE | EXPERTS).items()
    }
    (folder / "cases.json").write_text(json.dumps(cases))
    launch(
        "tests.training.dtype_ranks",
        [str(folder / "cases.json"), str(folder / "out.json")],
        nproc_per_node=2,
        log_path=folder / "log",
    )
    return json.loads((folder / "out.json").read_text())


def losses(outcomes: list[dict[str, Any]]) -> list[float]:
    return [outcome["loss"] for outcome in outcomes]


@pytest.mark.parametrize(
    ("name", "of_fp32", "tolerance"),
    [
        ("bf16", "fp32", 0.03),
        ("fp16", "fp32", 0.01),
        ("experts_fp16", "experts_fp32", 0.01),
        ("experts_fp16_ep", "experts_fp32", 0.01),
    ],
)
def test_half_the_bits_train_as_fp32_does(
    results: Any, name: str, of_fp32: str, tolerance: float
) -> None:
    """Tolerances: 8 bits of mantissa in bf16, 11 in fp16, over 8 steps."""
    expected, found = losses(results[of_fp32]), losses(results[name])
    assert expected[-1] < 0.9 * expected[0]
    assert found == pytest.approx(expected, rel=tolerance)
    first, first_of_fp32 = (results[case][0]["grad_norm"] for case in (name, of_fp32))
    assert first == pytest.approx(first_of_fp32, rel=tolerance)
    assert all(outcome["updated"] and outcome["moved"] for outcome in results[name])


@pytest.mark.parametrize("name", ["fp16_overflows", "experts_overflow"])
def test_an_overflow_skips_the_step_and_halves_the_loss_scale(results: Any, name: str) -> None:
    outcomes = results[name]
    skipped = [outcome for outcome in outcomes if not outcome["updated"]]
    assert 2 <= len(skipped) < len(outcomes)
    assert outcomes[: len(skipped)] == skipped
    scales = [outcome["loss_scale"] for outcome in outcomes]
    # the first overflow is forgiven, each further one halves; a restart goes on from there
    halvings = [max(min(i, len(skipped)) - 1, 0) for i in range(len(outcomes))]
    assert scales == [TOO_LARGE / 2**i for i in halvings]
    for outcome in skipped:
        assert not outcome["moved"]
        assert outcome["rate"] == outcomes[0]["rate"]  # nor does the schedule move
        assert math.isinf(outcome["grad_norm"])
        assert math.isfinite(outcome["loss"])
    assert all(outcome["moved"] for outcome in outcomes[len(skipped) :])
    assert outcomes[-1]["rate"] < outcomes[0]["rate"]


@pytest.mark.parametrize("name", ["fp16_grows", "experts_grow"])
def test_steps_without_an_overflow_double_the_loss_scale(results: Any, name: str) -> None:
    scales = [outcome["loss_scale"] for outcome in results[name]]
    assert scales == [2.0, 2.0, 4.0, 4.0, 8.0, 8.0, 16.0, 16.0]


@pytest.mark.parametrize("layout", ["", "_ep"])
def test_an_overflow_in_one_expert_skips_the_step_of_all(results: Any, layout: str) -> None:
    """The scale is halved once, and kept over a restart; the steps that follow it are those of a
    run without an overflow, whose loss is scaled by another power of two.

    Tolerance of the norm: 1e-7 more or less of one step's clipping rounds some half weights
    otherwise, and is 1.4e-3 of the norm four steps later.
    """
    outcomes = results[f"one_expert_overflows{layout}"]
    skipped = outcomes.pop(OVERFLOW_AT)
    assert not skipped["updated"] and not skipped["moved"]
    assert all(outcome["updated"] and outcome["moved"] for outcome in outcomes)
    assert skipped["loss_scale"] == 64.0
    assert [o["loss_scale"] for o in outcomes] == [64.0] * OVERFLOW_AT + [32.0] * 4
    steady = results[f"experts_fp16{layout}"][: len(outcomes)]
    for name, tolerance in (("loss", 1e-3), ("grad_norm", 3e-3), ("rate", 1e-3)):
        expected = pytest.approx([outcome[name] for outcome in steady], rel=tolerance)
        assert [outcome[name] for outcome in outcomes] == expected


def test_only_fp16_has_a_loss_scale(results: Any) -> None:
    assert "loss_scale" not in results["bf16"][0]
    assert "loss_scale" not in results["fp32"][0]


def test_offload_is_refused_where_there_is_nothing_to_offload_from(results: Any) -> None:
    assert "optimizer_cpu_offload: this machine has no CUDA device" in results["offload"]


def test_offloaded_parameters_train_and_resume_as_the_others_do(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    launch(
        "tests.training.offload_rank",
        [str(tiny_model("qwen3_vl")), str(tmp_path / "out.json")],
        nproc_per_node=1,
        log_path=tmp_path / "log",
    )
    found = json.loads((tmp_path / "out.json").read_text())
    on_host, on_gpu = found["half"]["on_host_and_gpu"]
    assert 0.5 <= on_host / (on_host + on_gpu) < 0.7
    assert found["all"]["on_host_and_gpu"][1] == 0
    for name in ("half", "all"):
        assert found[name]["losses"] == pytest.approx(found["none"]["losses"], rel=1e-6)
    assert found["none"]["losses"][-1] < 0.6 * found["none"]["losses"][0]
