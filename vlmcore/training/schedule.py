"""Learning rates by step, under Megatron's names, for an engine that has no schedule of its own."""

from __future__ import annotations

import math

from vlmcore.recipe.train_stage import TrainStage


def learning_rate(stage: TrainStage, done: int, *, peak: float) -> float:
    """Rate of the step that follows `done` steps.

    Step k of a warm-up of w steps has k / (w + 1) of the peak, so that none is wasted on a rate of
    0; what follows is Megatron-Core 0.16's `OptimizerParamScheduler`.

    Args:
        stage: Warm-up, shape and length.
        done: Optimizer steps so far.
        peak: Of the parameter group; its `min_lr` is in proportion.
    """
    warmup = warmup_steps(stage)
    if done < warmup:
        return peak * (done + 1) / (warmup + 1)
    floor = stage.min_lr * peak / stage.learning_rate
    return floor + (peak - floor) * _share(stage, done, warmup)


def warmup_steps(stage: TrainStage) -> int:
    """Steps of the warm-up; at least one step of the stage comes after it."""
    warmup = stage.lr_warmup_iters
    if warmup is None:
        warmup = round(stage.lr_warmup_fraction * stage.train_iters)
    return min(warmup, stage.train_iters - 1)


def _share(stage: TrainStage, done: int, warmup: int) -> float:
    """What is left of the way from peak to floor, 1 to 0."""
    if stage.lr_decay_style == "constant":
        return 1.0
    if stage.lr_decay_style != "WSD":
        ratio = (done - warmup) / (stage.train_iters - warmup)
        return _SHAPES[stage.lr_decay_style](ratio)
    assert stage.lr_wsd_decay_iters is not None
    falling = done - (stage.train_iters - stage.lr_wsd_decay_iters)
    return _SHAPES[stage.lr_wsd_decay_style](max(falling, 0) / stage.lr_wsd_decay_iters)


_SHAPES = {
    "linear": lambda ratio: 1.0 - ratio,
    "cosine": lambda ratio: 0.5 * (math.cos(math.pi * ratio) + 1.0),
    "exponential": lambda ratio: 2.0 * 0.5**ratio - 1.0,
    "minus_sqrt": lambda ratio: 1.0 - math.sqrt(ratio),
}
