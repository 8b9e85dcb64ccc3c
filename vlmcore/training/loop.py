"""The training loop of the megatron engine: from a job to a trained model folder."""

from __future__ import annotations

import json
import math
import resource
import shutil
import time
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.transformer.module import MegatronModule
from megatron.energon.savable_loader import SavableDataLoader

from vlmcore import megatron_cpu
from vlmcore.dataloading.encode import ConversationEncoder
from vlmcore.dataloading.loader import train_loader
from vlmcore.dataloading.samples import PackedRow
from vlmcore.dataloading.task_encoder import ConversationTaskEncoder
from vlmcore.errors import TrainError
from vlmcore.families import family_of, read_config
from vlmcore.models.build import build_model
from vlmcore.models.folder import config_dir, load_folder, save_folder
from vlmcore.training.checkpoint import Checkpointer
from vlmcore.training.distributed import layout_of
from vlmcore.training.freezing import apply_freezes
from vlmcore.training.job import METRICS, TRAINABLE, TrainJob
from vlmcore.training.optimizer import build_optimizer, build_schedule
from vlmcore.training.progress import MetricsFile, report_progress
from vlmcore.training.step import train_step


def train(job: TrainJob) -> None:
    """Runs a job to its last step and writes the trained model folder.

    Raises:
        TrainError: Nothing trainable, an impossible layout, or a loss that is not finite.
    """
    stage = job.stage
    module = _load_model(job)
    trainable = apply_freezes(module, family_of(read_config(config_dir(job.model_dir))), stage)
    model = DistributedDataParallel(
        module.config,
        DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
        module,
    )
    optimizer = build_optimizer(model, stage)
    schedule = build_schedule(optimizer, stage)
    module.config.grad_scale_func = optimizer.scale_loss
    module.config.finalize_model_grads_func = finalize_model_grads
    loader = _build_loader(job)
    checkpoints = Checkpointer(
        job.scratch_dir, model=model, optimizer=optimizer, schedule=schedule, loader=loader
    )
    start = checkpoints.restore()
    leads = dist.get_rank() == 0
    metrics = MetricsFile(job.scratch_dir / METRICS, after_step=start) if leads else None
    if leads:
        report_progress(step=start, total=stage.train_iters, trainable=trainable)

    rows = iter(loader)
    num_micro_batches = stage.global_batch_size // (
        stage.micro_batch_size * stage.data_parallel_size
    )
    for step in range(start + 1, stage.train_iters + 1):
        began = time.perf_counter()
        with megatron_cpu.suspended():
            batch = [next(rows) for _ in range(num_micro_batches)]
        loaded = time.perf_counter()
        learning_rate = optimizer.param_groups[0]["lr"]
        outcome = train_step(model, optimizer, batch)
        schedule.step(increment=1)
        seconds = time.perf_counter() - began
        outcome |= {
            "step": step,
            "learning_rate": learning_rate,
            "data_s": loaded - began,
            "step_s": seconds,
            "tokens_per_s": outcome["tokens"] / seconds,
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        if metrics is not None:
            metrics.write(outcome)
        if not math.isfinite(outcome["loss"]) or not math.isfinite(outcome["grad_norm"]):
            _stop_on_bad_loss(job, batch, outcome)
        last = step == stage.train_iters
        if leads and (last or step % stage.log_interval == 0 or step == start + 1):
            report_progress(total=stage.train_iters, **outcome)
        if not last and step % stage.save_interval == 0:
            checkpoints.save(step)

    save_folder([module], job.output_dir, like=job.model_dir)
    if metrics is not None:
        metrics.close()
        shutil.copyfile(job.scratch_dir / METRICS, job.output_dir / METRICS)
        (job.output_dir / TRAINABLE).write_text(json.dumps(trainable, indent=1) + "\n")


def _load_model(job: TrainJob) -> MegatronModule:
    stage = job.stage
    (module,) = build_model(
        config_dir(job.model_dir),
        layout=layout_of(stage),
        params_dtype=getattr(torch, stage.torch_dtype),
    )
    module.to(megatron_cpu.device())
    load_folder([module], job.model_dir)
    return module


def _build_loader(job: TrainJob) -> SavableDataLoader[PackedRow]:
    stage = job.stage
    encoder = ConversationEncoder(
        config_dir(job.model_dir), task=stage.task, max_pixels=stage.max_pixels
    )
    task_encoder = ConversationTaskEncoder(
        encoder,
        max_length=stage.max_length,
        multiple=stage.tensor_model_parallel_size if stage.sequence_parallel else 1,
    )
    return train_loader(
        job.datasets,
        task_encoder,
        micro_batch_size=stage.micro_batch_size,
        packing_buffer_size=stage.packing_buffer_size if stage.packing else None,
        seed=stage.seed,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        blend_file=job.scratch_dir / f"blend_{dist.get_rank()}.yaml",
    )


def _stop_on_bad_loss(job: TrainJob, batch: list[PackedRow], outcome: dict[str, Any]) -> None:
    path = job.scratch_dir / f"bad_batch_rank{dist.get_rank()}.pt"
    torch.save([{f.name: getattr(row, f.name) for f in fields(row)} for row in batch], path)
    dist.barrier()
    raise TrainError(
        f"train.{job.stage.name}: step {outcome['step']}: loss {outcome['loss']}, gradient norm "
        f"{outcome['grad_norm']}; the batch is kept as {path}. Lower learning_rate or look for bad "
        f"samples: {', '.join(row.__key__ for row in batch)}"
    )
