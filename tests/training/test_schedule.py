from types import SimpleNamespace
from typing import Any

import pytest

from vlmcore.recipe.train_stage import TrainStage
from vlmcore.training.optimizer import build_schedule
from vlmcore.training.schedule import learning_rate

STYLES: list[dict[str, Any]] = [
    {"lr_decay_style": "constant"},
    {"lr_decay_style": "cosine"},
    {"lr_decay_style": "linear", "lr_warmup_iters": 0},
    {"lr_decay_style": "linear", "lr_warmup_iters": 50},  # more than there are steps
    *(
        {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 7, "lr_wsd_decay_style": style}
        for style in ("exponential", "linear", "cosine", "minus_sqrt")
    ),
]


@pytest.mark.parametrize("style", STYLES, ids=str)
def test_both_engines_have_the_same_rates(style: dict[str, Any]) -> None:
    fields = {"lr_warmup_fraction": 0.2} if "lr_warmup_iters" not in style else {}
    stage = TrainStage(
        name="s", data=("d",), train_iters=20, learning_rate=0.5, min_lr=0.1, **fields, **style
    )
    # of a stage's own rate, and of a group's: as the megatron engine marks it
    groups = [{}, {"max_lr": 0.2, "min_lr": 0.04}]
    schedule = build_schedule(SimpleNamespace(param_groups=groups), stage)
    for done in range(20):
        for group, peak in zip(groups, (0.5, 0.2), strict=True):
            assert learning_rate(stage, done, peak=peak) == pytest.approx(group["lr"]), done
        schedule.step(increment=1)
