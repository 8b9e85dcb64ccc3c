"""Weights into Megatron-Core and back, each with its figures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks.caching import Ref, Run
from vlmcore.artifacts import BuildContext
from vlmcore.errors import ProofError, VlmflowError
from vlmcore.layout import Layout
from vlmcore.recipe.schema import Convert, Export

PRECISION = "precision.json"
FP32_TOLERANCE = 1e-4  # see Convert.tolerance
FIGURES = ("keys_read", "keys_written", "digest")


def to_mcore(run: Run, name: str, convert: Convert, *, model: Ref) -> Ref:
    """A Megatron model folder of an HF one, and the precision test at each layout."""

    def build(context: BuildContext) -> Mapping[str, Any]:
        from vlmcore.training.launch import run_precision_test
        from vlmcore.weights.convert import to_mcore as convert_weights

        assert model is not None
        work = context.scratch / "model"  # a killed build goes on there
        if not work.exists():
            convert_weights(model.path, work, on_progress=_in_gigabytes(run, name))
        figures = _figures(work)
        if convert.check:
            with _proving(work):
                rows = run_precision_test(
                    model.path,
                    work,
                    layouts=convert.layouts,
                    tolerance=convert.tolerance,
                    log_path=run.log_path(name),
                    out=work / PRECISION,
                )
                figures["max_logit_diff"] = _judge(name, rows)
        work.rename(context.path)
        return figures

    return run.stage(
        name,
        build,
        kind="to_mcore",
        version=3,
        params=convert.content_params(),
        inputs={"model": model},
        volatile=(PRECISION,),
        resumable=True,
    )


def precision(run: Run, name: str, convert: Convert, *, model: Ref) -> Ref:
    """The precision test alone, for training that reads the HF model straight into its ranks."""

    def build(context: BuildContext) -> Mapping[str, Any]:
        from vlmcore.training.launch import run_precision_test

        assert model is not None
        rows = run_precision_test(
            model.path,
            model.path,
            layouts=convert.layouts,
            tolerance=convert.tolerance,
            log_path=run.log_path(name),
            out=context.path / PRECISION,
        )
        return {"max_logit_diff": _judge(name, rows)}

    return run.stage(
        name,
        build,
        kind="precision",
        version=1,
        params=convert.content_params(),
        inputs={"model": model},
    )


def export(run: Run, name: str, export: Export, *, trained: Ref) -> Ref:
    """An HF model folder of a Megatron one; reloaded, it gives the trained model's logits."""

    def build(context: BuildContext) -> Mapping[str, Any]:
        from vlmcore.training.launch import run_precision_test
        from vlmcore.weights.architecture import check_against_architecture

        assert trained is not None
        work = context.scratch / "model"  # a killed build goes on there
        if not work.exists():
            _write_hf(trained.path, work, export, on_progress=_in_gigabytes(run, name))
        with _proving(work):
            check_against_architecture(work)
            rows = run_precision_test(
                work,
                trained.path,
                layouts=[Layout()],
                tolerance=FP32_TOLERANCE,
                log_path=run.log_path(name),
                out=work / PRECISION,
                round_to=export.dtype,
            )
            figures = _figures(work) | {"max_logit_diff": _judge(name, rows)}
        work.rename(context.path)
        return figures

    return run.stage(
        name,
        build,
        kind="export",
        version=3,
        params=export.content_params(),
        inputs={"trained": trained},
        volatile=(PRECISION,),
        resumable=True,
    )


def _write_hf(
    trained: Path, target: Path, export: Export, *, on_progress: Callable[[int, int], None]
) -> None:
    """HF weights of a trained model folder, Megatron's or HF's own (trained on the fly)."""
    from vlmcore.weights.convert import CHECKPOINT, to_hf
    from vlmcore.weights.recast import recast

    options = {"dtype": export.dtype, "max_shard_size": export.max_shard_size}
    if (trained / CHECKPOINT).is_dir():
        to_hf(trained, target, **options, on_progress=on_progress)
    else:
        recast(trained, target, **options)


@contextmanager
def _proving(work: Path) -> Iterator[None]:
    """Sets aside what a proof fails, so that the next build starts anew rather than go on there."""
    try:
        yield
    except VlmflowError:
        failed = work.with_name("failed")
        shutil.rmtree(failed, ignore_errors=True)
        work.rename(failed)
        raise


def _figures(work: Path) -> dict[str, Any]:
    report = json.loads((work / "conversion.json").read_text())
    return {key: report[key] for key in FIGURES}


def _in_gigabytes(run: Run, stage: str) -> Callable[[int, int], None]:
    """Reports progress, ten times on the way; a model below a gigabyte is done in no time."""
    told = -1

    def hear(done: int, total: int) -> None:
        nonlocal told
        if total > 10**9 and done * 10 // total > told:
            told = done * 10 // total
            run.progress(stage, done / 1e9, total / 1e9, "GB")

    return hear


def _judge(stage: str, rows: list[dict[str, Any]]) -> float:
    """The largest logit difference.

    Raises:
        ProofError: A sample is past its tolerance.
    """
    failed = [
        f"{row['sample']} at {row['layout']}: largest logit difference {row['max_diff']:.3g}, "
        f"tolerance {row['tolerance']:.3g}, top-1 agreement {row['top1_agreement']:.1%}; first "
        f"apart at {row['diverges_at']}"
        for row in rows
        if not row["passed"]
    ]
    if failed:
        raise ProofError(f"{stage}: the precision test failed:\n  " + "\n  ".join(failed))
    return max(float(row["max_diff"]) for row in rows)
