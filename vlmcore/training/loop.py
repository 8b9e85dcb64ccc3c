"""The training loop of the megatron engine: from a job to a trained model folder."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.energon.savable_loader import SavableDataLoader

from vlmcore import megatron_cpu
from vlmcore.dataloading.encode import dummy_vision_inputs
from vlmcore.dataloading.loader import stage_loader, stage_task_encoder, stop_workers
from vlmcore.dataloading.samples import PackedRow
from vlmcore.errors import TrainError
from vlmcore.families import family_of, read_config
from vlmcore.models.folder import config_dir, save_folder
from vlmcore.training.checkpoint import Checkpointer
from vlmcore.training.job import ADAPTER, METRICS, TRAINABLE, TrainJob
from vlmcore.training.model import Training, prepare
from vlmcore.training.progress import MetricsFile, report_progress
from vlmcore.training.throughput import Throughput
from vlmcore.training.tuning import save_and_merge


def train(job: TrainJob) -> None:
    """Runs a job to its last step and writes the trained model folder.

    Raises:
        TrainError: Nothing trainable, an impossible layout, or a loss that is not finite.
    """
    stage = job.stage
    hf_dir = config_dir(job.model_dir)
    task_encoder = stage_task_encoder(stage, hf_dir)
    training = prepare(stage, job.model_dir, idle_inputs=dummy_vision_inputs(task_encoder.encoder))
    loader = stage_loader(
        stage,
        job.datasets,
        task_encoder,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        blend_file=job.scratch_dir / f"blend_{dist.get_rank()}.yaml",
    )
    try:
        _run_steps(job, training, loader)
    finally:
        stop_workers(loader)

    if training.plan is not None:
        save_and_merge(
            training.modules,
            training.plan,
            job.output_dir / ADAPTER,
            hf_dir=hf_dir,
            work=job.scratch_dir / ADAPTER,
        )
    save_folder(training.modules, job.output_dir, like=job.model_dir)
    if dist.get_rank() == 0:
        shutil.copyfile(job.scratch_dir / METRICS, job.output_dir / METRICS)
        table = json.dumps(training.trainable, indent=1)
        (job.output_dir / TRAINABLE).write_text(table + "\n")


def _run_steps(job: TrainJob, training: Training, loader: SavableDataLoader[PackedRow]) -> None:
    """Trains from the last checkpoint, or the start, to the last step."""
    stage = job.stage
    checkpoints = Checkpointer(job.scratch_dir, training=training, stage=stage, loader=loader)
    start = checkpoints.restore()
    leads = dist.get_rank() == 0
    metrics = MetricsFile(job.scratch_dir / METRICS, after_step=start) if leads else None
    if leads:
        report_progress(step=start, total=stage.train_iters, trainable=training.trainable)

    config = read_config(config_dir(job.model_dir))
    throughput = Throughput(family_of(config).language_model(config), stage)
    rows = iter(loader)
    for step in range(start + 1, stage.train_iters + 1):
        began = time.perf_counter()
        with megatron_cpu.suspended():
            batch = [next(rows) for _ in range(stage.num_micro_batches)]
        loaded = time.perf_counter()
        learning_rate = training.learning_rate
        outcome = training.step(batch)
        training.schedule.step(increment=1)
        outcome |= {"step": step, "learning_rate": learning_rate, "data_s": loaded - began}
        outcome |= throughput(outcome, step_s=time.perf_counter() - began)
        if metrics is not None:
            metrics.write(outcome)
        if not math.isfinite(outcome["loss"]) or not math.isfinite(outcome["grad_norm"]):
            _stop_on_bad_loss(job, batch, outcome)
        last = step == stage.train_iters
        if leads and (last or step % stage.log_interval == 0 or step == start + 1):
            report_progress(total=stage.train_iters, **outcome)
        if not last and step % stage.save_interval == 0:
            checkpoints.save(step)
    if metrics is not None:
        metrics.close()


def _stop_on_bad_loss(job: TrainJob, batch: list[PackedRow], outcome: dict[str, Any]) -> None:
    path = job.scratch_dir / f"bad_batch_rank{dist.get_rank()}.pt"
    torch.save([{f.name: getattr(row, f.name) for f in fields(row)} for row in batch], path)
    dist.barrier()
    raise TrainError(
        f"train.{job.stage.name}: step {outcome['step']}: loss {outcome['loss']}, gradient norm "
        f"{outcome['grad_norm']}; the batch is kept as {path}. Lower learning_rate or look for bad "
        f"samples: {', '.join(row.__key__ for row in batch)}"
    )
