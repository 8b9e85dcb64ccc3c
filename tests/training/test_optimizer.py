import math
from types import SimpleNamespace

import pytest
import torch

from vlmcore.recipe.train_stage import TrainStage
from vlmcore.training.optimizer import GroupStepAdam, build_schedule


def steps(optimizer_type: type, *, gradless: bool = False, count: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in ((3, 4), (5,), (2, 2))]
    params = [torch.nn.Parameter(weight) for weight in weights]
    groups = [
        {"params": params[:1], "weight_decay": 0.1},
        {"params": params[1:], "weight_decay": 0.0, "lr": 0.02},
    ]
    optimizer = optimizer_type(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-6)
    for _ in range(count):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        if gradless:
            params[2].grad = None
        optimizer.step()
    return [param.detach() for param in params]


@pytest.mark.parametrize("gradless", [False, True])
def test_the_optimizer_is_torchs_adamw(gradless: bool) -> None:
    ours, theirs = (steps(kind, gradless=gradless) for kind in (GroupStepAdam, torch.optim.AdamW))
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_its_state_is_two_moments_and_a_step_of_the_group() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = GroupStepAdam([param])
    for _ in range(3):
        param.grad = torch.ones(2)
        optimizer.step()
    assert set(optimizer.state[param]) == {"exp_avg", "exp_avg_sq"}
    assert optimizer.param_groups[0]["step"] == 3


def rates(**fields: object) -> list[float]:
    """The learning rate of every step."""
    stage = TrainStage(
        name="s", data=("d",), train_iters=20, learning_rate=1.0, min_lr=0.1, **fields
    )
    group = {"lr": math.nan, "weight_decay": math.nan}
    schedule = build_schedule(SimpleNamespace(param_groups=[group]), stage)
    found = []
    for _ in range(20):
        found.append(group["lr"])
        schedule.step(increment=1)
    return [*found, group["lr"]]


def test_the_rate_warms_up_and_falls_to_its_minimum() -> None:
    """Step k of w warm-up steps has k / (w + 1) of the peak: none is wasted on a rate of 0."""
    found = rates(lr_warmup_fraction=0.2)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * i / 16)) / 2 for i in range(17)]
    assert found[4:] == pytest.approx(expected)
    assert rates(lr_warmup_iters=4) == found


def test_other_decay_styles() -> None:
    linear = rates(lr_warmup_fraction=0.0, lr_decay_style="linear")
    assert linear == pytest.approx([1.0 - 0.9 * i / 20 for i in range(21)])
    assert rates(lr_warmup_fraction=0.0, lr_decay_style="constant") == pytest.approx([1.0] * 21)


def test_wsd_stays_at_the_peak_until_its_fall() -> None:
    fields = {"lr_warmup_iters": 4, "lr_decay_style": "WSD", "lr_wsd_decay_iters": 8}
    linear = rates(**fields, lr_wsd_decay_style="linear")
    assert linear[4:13] == pytest.approx([1.0] * 9)
    assert linear[12:] == pytest.approx([1.0 - 0.9 * i / 8 for i in range(9)])
    halves = rates(**fields)  # to twice a half less one
    assert halves[16] == pytest.approx(0.1 + 0.9 * (2 * 0.5**0.5 - 1))


def test_groups_with_a_rate_of_their_own_warm_up_and_fall_alike() -> None:
    stage = TrainStage(
        name="s", data=("d",), train_iters=10, learning_rate=1.0, min_lr=0.1, lr_warmup_iters=2
    )
    groups = [{"max_lr": 1.0, "min_lr": 0.1}, {"max_lr": 0.2, "min_lr": 0.02}]
    schedule = build_schedule(SimpleNamespace(param_groups=groups), stage)
    for _ in range(11):
        assert groups[1]["lr"] == pytest.approx(0.2 * groups[0]["lr"])
        schedule.step(increment=1)


def test_warming_up_for_all_steps_still_ends_at_the_peak() -> None:
    assert max(rates(lr_warmup_fraction=1.0)) == pytest.approx(1.0)
