"""Stages of one step, for scripts that run on ranks."""

from typing import Any

from vlmcore.recipe.train_stage import TrainStage


def stage(**fields: Any) -> TrainStage:
    """A stage of one fp32 step on two ranks at a constant rate, unless said otherwise."""
    defaults = {
        "name": "step",
        "data": ("numbers",),
        "train_iters": 1,
        "learning_rate": 0.1,
        "lr_decay_style": "constant",
        "lr_warmup_fraction": 0.0,
        "global_batch_size": 2,
        "nproc_per_node": 2,
        "torch_dtype": "float32",
    }
    return TrainStage(**(defaults | fields))
