"""A training stage: a job for the ranks, and their progress."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import fmean
from typing import Any

from tasks.caching import Ref, Run
from vlmcore.artifacts import ArtifactRef, BuildContext
from vlmcore.layout import Layout
from vlmcore.recipe.train_stage import TrainStage
from vlmcore.training.job import METRICS, TrainJob

LOSS_PLOT = "loss.svg"
# a checkpoint is taken up at any other layout
_LAYOUT = (*(field.name for field in fields(Layout)), "nproc_per_node", "nnodes", "fsdp")


def train(
    run: Run, stage: TrainStage, *, model: Ref, datasets: Sequence[Ref], weights: Sequence[float]
) -> Ref:
    """A trained model folder; a killed build goes on from its last checkpoint, at any layout.

    Adapters are merged into it, and stand beside the weights as peft's folder.

    Args:
        run: The walk.
        stage: What to train, and how.
        model: Where it starts from.
        datasets: Energon datasets.
        weights: How often each dataset is drawn from, relative to the others.
    """
    name = f"train.{stage.name}"

    def build(context: BuildContext) -> Mapping[str, Any]:
        from vlmcore.training.launch import launch
        from vlmcore.training.nodes import nodes_of

        assert isinstance(model, ArtifactRef)
        drawn: dict[Path, float] = {}  # one that is named twice is drawn twice as often
        for ref, weight in zip(datasets, weights, strict=True):
            assert ref is not None
            drawn[ref.path] = drawn.get(ref.path, 0.0) + weight
        job = TrainJob(
            stage=stage,
            model_dir=model.path,
            datasets=drawn,
            output_dir=context.path,
            scratch_dir=context.scratch,
            cache_dir=run.store.encoded_samples if stage.cache_encoded_samples else None,
        )
        if job.cache_dir is not None:
            _make_room(run, name, job.cache_dir, max_bytes=stage.max_encoded_bytes)
        job_file = context.scratch / "job.json"
        job_file.write_text(job.model_dump_json(indent=1))
        nodes = nodes_of(stage)
        if nodes.nnodes > 1:
            others = f"run on each of the other {nodes.nnodes - 1} nodes, with its NODE_RANK"
            run.note(name, f"{others}: python -m vlmcore.training.nodes {job_file}")
        launch(
            "vlmcore.training.main",
            ["--job", str(job_file)],
            nproc_per_node=stage.nproc_per_node,
            nodes=nodes,
            log_path=run.log_path(name),
            on_progress=lambda values: _report(run, name, values),
        )
        return _summarise(context.path, name)

    params = {key: value for key, value in stage.content_params().items() if key != "name"}
    if len(datasets) > 1:
        params["weights"] = list(weights)
    return run.stage(
        name,
        build,
        kind="train",
        version=3,
        params=params,
        inputs={"model": model, "data": list(datasets)},
        volatile=("checkpoint/.metadata", METRICS, LOSS_PLOT),
        resumable=True,
        resumes_over=_LAYOUT,
    )


def _make_room(run: Run, name: str, cache_dir: Path, *, max_bytes: int) -> None:
    from vlmcore.dataloading.cache_room import make_room

    if removed := make_room(cache_dir, max_bytes):
        run.note(name, f"removed {removed / 1e6:,.1f} MB of encoded samples, the longest unused")


def _report(run: Run, name: str, values: Mapping[str, Any]) -> None:
    if "trainable" in values:  # the first thing that the ranks say
        run.note(name, _what_trains(values["trainable"]))
        if values["step"]:
            run.note(name, f"goes on from the checkpoint of step {values['step']}")
    run.progress(name, values["step"], values["total"], _figures(values))


# what a progress line says of a step, where the step has it
_FIGURES = {
    "loss": "loss {:.4f}",
    "aux_loss": "aux loss {:.4f}",
    "eval_loss": "eval loss {:.4f}",
    "grad_norm": "grad norm {:.3g}",
    "learning_rate": "lr {:.2e}",
    "tokens_per_s": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
}


def _figures(values: Mapping[str, Any]) -> str:
    return "  ".join(
        text.format(values[figure]) for figure, text in _FIGURES.items() if figure in values
    )


def _what_trains(table: Mapping[str, Mapping[str, int]]) -> str:
    """The trainable table in one line."""
    groups = [
        f"{group} {row['trainable']:,} of {row['parameters']:,}" for group, row in table.items()
    ]
    return f"trains {', '.join(groups)} parameters"


def _summarise(folder: Path, name: str) -> dict[str, Any]:
    """Draws the loss plot; gives the figures of the manifest."""
    from vlmcore.report.loss_plot import loss_plot_svg

    metrics = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    (folder / LOSS_PLOT).write_text(loss_plot_svg(metrics, title=name))
    seconds = sum(row["step_s"] for row in metrics)
    causes: Counter[str] = Counter()
    for row in metrics:
        causes.update(row.get("dropped_by_cause", {}))
    return {
        "final_loss": metrics[-1]["loss"],
        **_lowest_eval_loss(metrics),
        "steps": len(metrics),
        "skipped_steps": sum(not row["updated"] for row in metrics),
        "samples": sum(row["samples"] for row in metrics),
        "dropped": sum(row["dropped"] for row in metrics),
        "dropped_by_cause": dict(causes.most_common()),
        **_mean_fill(metrics),
        "tokens_per_s": sum(row["tokens"] for row in metrics) / max(seconds, 1e-9),
        "largest_rank_memory_mb": max(row["largest_rank_memory_mb"] for row in metrics),
    }


def _mean_fill(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How full packed rows were; nothing of a stage that does not pack."""
    found = [row["packing_fill"] for row in metrics if "packing_fill" in row]
    return {"packing_fill": fmean(found)} if found else {}


def _lowest_eval_loss(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The lowest loss on held-out data and its step; nothing where none was measured."""
    evaluated = [row for row in metrics if "eval_loss" in row]
    if not evaluated:
        return {}
    best = min(evaluated, key=lambda row: row["eval_loss"])
    return {"best_eval_loss": best["eval_loss"], "best_step": best["step"]}
