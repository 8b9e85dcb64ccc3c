"""Serving a checkpoint and scoring it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from tasks.caching import Ref, Run
from vlmcore.artifacts import BuildContext
from vlmcore.recipe.schema import Evaluate, Serve

PREDICTIONS = "predictions.jsonl"


def evaluate(
    run: Run, checkpoint: str, benchmark: Evaluate, serve: Serve, *, model: Ref, holdout: Ref
) -> Ref:
    """Every answer of a served checkpoint to the held-out questions, and the score."""
    name = f"evaluate.{checkpoint}.{benchmark.benchmark}"

    def build(context: BuildContext) -> Mapping[str, Any]:
        from data_prep.holdout import RECORDS_NAME
        from vlmcore.evaluation.score import score
        from vlmcore.serving import serve as serve_model
        from vlmcore.weights.architecture import check_against_architecture

        assert model is not None and holdout is not None
        with serve_model(
            model.path,
            serve,
            # EvalScope takes answers of one model name for those of another checkpoint
            model_name=f"{checkpoint}-{model.digest[:12]}",
            log_path=run.log_path(f"serve.{checkpoint}"),
            preflight=check_against_architecture,
        ) as endpoint:
            result = score(
                endpoint,
                benchmark=benchmark.benchmark,
                records=holdout.path / RECORDS_NAME,
                metric=benchmark.metric,
                work_dir=context.scratch / "evaluation",
                max_tokens=benchmark.max_tokens,
                concurrency=benchmark.concurrency,
            )
        shutil.copyfile(result.predictions, context.path / PREDICTIONS)
        scores = {f"{benchmark.benchmark}.{key}": value for key, value in result.metrics.items()}
        return {
            "scores": scores,
            "num_samples": result.num_samples,
            "engine": endpoint.engine,
            "server_started_in_s": endpoint.started_in_s,
        }

    params = benchmark.content_params()
    asked = {key: params[key] for key in ("benchmark", "metric", "max_tokens")}
    return run.stage(
        name,
        build,
        kind="evaluate",
        version=1,
        params={**asked, "serve": serve.content_params()},
        inputs={"model": model, "holdout": holdout},
    )
