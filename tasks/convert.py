"""Weights into Megatron-Core and back, each with its figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks.caching import Ref, Run
from vlmcore.artifacts import BuildContext
from vlmcore.errors import ProofError
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
        report = convert_weights(model.path, context.path)
        figures = {key: report[key] for key in FIGURES}
        if convert.check:
            rows = run_precision_test(
                model.path,
                context.path,
                layouts=convert.tensor_model_parallel_size,
                tolerance=convert.tolerance,
                log_path=run.log_path(name),
                out=context.path / PRECISION,
            )
            figures["max_logit_diff"] = _judge(name, rows)
        return figures

    return run.stage(
        name,
        build,
        kind="to_mcore",
        version=2,
        params=convert.content_params(),
        inputs={"model": model},
        volatile=("checkpoint/.metadata", PRECISION),
    )


def export(run: Run, name: str, export: Export, *, trained: Ref) -> Ref:
    """An HF model folder of a Megatron one; reloaded, it gives the trained model's logits."""

    def build(context: BuildContext) -> Mapping[str, Any]:
        import torch

        from vlmcore.training.launch import run_precision_test
        from vlmcore.weights.architecture import check_against_architecture
        from vlmcore.weights.convert import to_hf

        assert trained is not None
        report = to_hf(
            trained.path,
            context.path,
            dtype=getattr(torch, export.dtype),
            max_shard_size=export.max_shard_size,
        )
        check_against_architecture(context.path)
        rows = run_precision_test(
            context.path,
            trained.path,
            layouts=[1],
            tolerance=FP32_TOLERANCE,
            log_path=run.log_path(name),
            out=context.path / PRECISION,
            round_to=export.dtype,
        )
        return {key: report[key] for key in FIGURES} | {"max_logit_diff": _judge(name, rows)}

    return run.stage(
        name,
        build,
        kind="export",
        version=2,
        params=export.content_params(),
        inputs={"trained": trained},
        volatile=(PRECISION,),
    )


def _judge(stage: str, rows: list[dict[str, Any]]) -> float:
    """The largest logit difference.

    Raises:
        ProofError: A sample is past its tolerance.
    """
    failed = [
        f"{row['sample']} at tensor parallel {row['tensor_model_parallel_size']}: largest logit "
        f"difference {row['max_diff']:.3g}, tolerance {row['tolerance']:.3g}, top-1 agreement "
        f"{row['top1_agreement']:.1%}"
        for row in rows
        if not row["passed"]
    ]
    if failed:
        raise ProofError(f"{stage}: the precision test failed:\n  " + "\n  ".join(failed))
    return max(float(row["max_diff"]) for row in rows)
