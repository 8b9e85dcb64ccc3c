"""A model under training as the loop sets it up, for scripts that run on ranks."""

from pathlib import Path
from typing import Any

from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)

from vlmcore.families import family_of, read_config
from vlmcore.models.build import build_model, load_weights
from vlmcore.recipe.schema import TrainStage
from vlmcore.training.distributed import layout_of
from vlmcore.training.freezing import apply_freezes
from vlmcore.training.optimizer import build_optimizer, build_schedule
from vlmcore.weights.convert import CHECKPOINT, SIDECAR


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


def under_training(mcore_dir: Path, stage: TrainStage) -> tuple[DistributedDataParallel, Any]:
    """Model with loaded weights and frozen groups, and its optimizer."""
    (module,) = build_model(mcore_dir / SIDECAR, layout=layout_of(stage))
    load_weights([module], mcore_dir / CHECKPOINT)
    apply_freezes(module, family_of(read_config(mcore_dir / SIDECAR)), stage)
    config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    model = DistributedDataParallel(module.config, config, module)
    optimizer = build_optimizer(model, stage)
    build_schedule(optimizer, stage)  # it sets the rate and decay of each parameter group
    module.config.grad_scale_func = optimizer.scale_loss
    module.config.finalize_model_grads_func = finalize_model_grads
    return model, optimizer
