"""The training loop of every engine: from a job to a trained model folder."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import fields
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from megatron.energon.savable_loader import SavableDataLoader
from torch import Tensor

from vlmcore import megatron_cpu
from vlmcore.dataloading.encode import dummy_vision_inputs
from vlmcore.dataloading.loader import row_maker, stage_loader, stage_task_encoder, stop_workers
from vlmcore.dataloading.samples import PackedRow
from vlmcore.dataloading.task_encoder import ConversationTaskEncoder
from vlmcore.errors import TrainError
from vlmcore.families import family_of, read_config
from vlmcore.recipe.train_stage import TrainStage
from vlmcore.training.checkpoint import Checkpointer
from vlmcore.training.engine import Engine
from vlmcore.training.held_out import HeldOut
from vlmcore.training.job import METRICS, TRAINABLE, TrainJob
from vlmcore.training.progress import MetricsFile, report_progress
from vlmcore.training.throughput import Throughput


def train(job: TrainJob) -> None:
    """Runs a job to its last step and writes the trained model folder.

    Raises:
        TrainError: Nothing trainable, an impossible layout, or a loss that is not finite.
    """
    stage = job.stage
    task_encoder = stage_task_encoder(stage, job.hf_dir, cache_dir=job.cache_dir)
    training = _prepare(job, dummy_vision_inputs(task_encoder.encoder))
    loader = stage_loader(
        stage,
        job.datasets,
        task_encoder,
        data_parallel_rank=training.data_parallel_rank,
        data_parallel_size=training.data_parallel_size,
        blend_file=job.scratch_dir / f"blend_{dist.get_rank()}.yaml",
    )
    held_out_encoder = row_maker(stage, task_encoder.encoder, task_encoder.cached)
    try:
        _run_steps(job, training, loader, held_out_encoder)
    finally:
        stop_workers(loader)

    training.write(job)
    if dist.get_rank() == 0:
        shutil.copyfile(job.scratch_dir / METRICS, job.output_dir / METRICS)
        table = json.dumps(training.trainable, indent=1)
        (job.output_dir / TRAINABLE).write_text(table + "\n")


def _prepare(job: TrainJob, idle_inputs: Mapping[str, Tensor]) -> Engine:
    """The stage's model on this rank; an engine's libraries are imported where it is asked for."""
    _require_routers(job)
    if job.stage.engine == "megatron":
        from vlmcore.training.model import prepare

        return prepare(job.stage, job.model_dir, idle_inputs=idle_inputs)
    from vlmcore.training.transformers_engine import prepare as prepare_transformers

    return prepare_transformers(job.stage, job.model_dir, idle_inputs=idle_inputs)


def _require_routers(job: TrainJob) -> None:
    stage, config = job.stage, read_config(job.hf_dir)
    asked = [n for n in ("moe_aux_loss_coeff", "moe_z_loss_coeff") if getattr(stage, n)]
    if asked and family_of(config).language_model(config).moe is None:
        raise TrainError(
            f"train.{stage.name}: {' and '.join(asked)}: a loss of routers, but this model has no "
            f"experts; leave it out"
        )


def _run_steps(
    job: TrainJob,
    training: Engine,
    loader: SavableDataLoader[PackedRow],
    held_out_encoder: ConversationTaskEncoder,
) -> None:
    """Trains from the last checkpoint, or the start, to the last step."""
    stage = job.stage
    checkpoints = Checkpointer(job.scratch_dir, training=training, stage=stage, loader=loader)
    start = checkpoints.restore()
    held_out = HeldOut(job, training, held_out_encoder, after_step=start)
    leads = dist.get_rank() == 0
    metrics = MetricsFile(job.scratch_dir / METRICS, after_step=start) if leads else None
    if leads:
        report_progress(step=start, total=stage.train_iters, trainable=training.trainable)

    config = read_config(job.hf_dir)
    throughput = Throughput(family_of(config).language_model(config), stage)
    rows = iter(loader)
    for step in range(start + 1, stage.train_iters + 1):
        began = time.perf_counter()
        with megatron_cpu.suspended():
            batch = [next(rows) for _ in range(stage.num_micro_batches)]
        loaded = time.perf_counter()
        learning_rate = training.learning_rate
        outcome = training.step(batch)
        outcome |= {"step": step, "learning_rate": learning_rate, "data_s": loaded - began}
        outcome |= throughput(outcome, step_s=time.perf_counter() - began)
        is_bad = _is_bad(outcome, stage)
        if held_out.is_due(step) and not is_bad:
            outcome |= held_out(step)
        if metrics is not None:
            metrics.write(outcome)
        if is_bad:
            _stop_on_bad_loss(job, batch, outcome)
        last = step == stage.train_iters
        told = last or step % stage.log_interval == 0 or step == start + 1
        if leads and (told or "eval_loss" in outcome):
            report_progress(total=stage.train_iters, **outcome)
        checkpoints.publish(wait=last)
        if not last and step % stage.save_interval == 0:
            checkpoints.save(step)
    if metrics is not None:
        metrics.close()
    held_out.load_best()


def _is_bad(outcome: Mapping[str, Any], stage: TrainStage) -> bool:
    """Whether training has come to its end: no finite loss, or no finite gradient to go on with."""
    if not outcome["updated"] and math.isfinite(outcome["loss"]):  # an overflow of fp16
        return bool(outcome["loss_scale"] <= stage.min_loss_scale)
    return not (math.isfinite(outcome["loss"]) and math.isfinite(outcome["grad_norm"]))


def _stop_on_bad_loss(job: TrainJob, batch: list[PackedRow], outcome: dict[str, Any]) -> None:
    path = job.scratch_dir / f"bad_batch_rank{dist.get_rank()}.pt"
    torch.save([{f.name: getattr(row, f.name) for f in fields(row)} for row in batch], path)
    dist.barrier()
    raise TrainError(
        f"train.{job.stage.name}: step {outcome['step']}: loss {outcome['loss']}, gradient norm "
        f"{outcome['grad_norm']}; the batch is kept as {path}, with the keys of its "
        f"{sum(row.num_samples for row in batch)} samples. Lower learning_rate or look for bad "
        f"samples among them: {_first(key for row in batch for key in row.keys)}"
    )


def _first(keys: Iterable[str], most: int = 8) -> str:
    named = list(islice(keys, most + 1))
    return ", ".join(named[:most]) + (" …" if len(named) > most else "")
