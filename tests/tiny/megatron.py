"""Stages of one step, for scripts that run on ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlmcore.recipe.train_stage import TrainStage
from vlmcore.training.distributed import model_parallel
from vlmcore.training.model import Training, prepare


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


@contextmanager
def prepared(stage: TrainStage, hf_dir: Path, **options: Any) -> Iterator[Training]:
    """A stage laid out over the ranks and ready to train; empty afterwards.

    What refers to a model keeps its process groups and their threads alive: after forty layouts
    nothing else runs. The config refers to optimizer and chunks, a cycle that no collector sees
    through.
    """
    with model_parallel(stage.layout, seed=0):
        training = prepare(stage, hf_dir, **options)
        try:
            yield training
        finally:
            config = training.modules[0].config
            config.grad_scale_func = config.no_sync_func = None
            for part in (part for module in training.modules for part in module.modules()):
                if hasattr(part, "token_dispatcher"):  # keeps the last step's graph
                    vars(part.token_dispatcher).clear()
            vars(training).clear()
