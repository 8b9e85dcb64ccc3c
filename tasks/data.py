"""A dataset's stages: raw rows, webdataset shards, energon dataset, and the held-out questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tasks.caching import Ref, Run
from vlmcore.artifacts import BuildContext
from vlmcore.recipe.schema import Dataset, Evaluate


def raw_dataset(run: Run, name: str, dataset: Dataset, *, seed: int) -> Ref:
    """Rows and images as the source gives them."""
    from data_prep.sources import fetch, fingerprint

    def build(context: BuildContext) -> None:
        fetch(dataset.source, context.path, options=dict(dataset.options), seed=seed)

    return run.stage(
        f"data.{name}.raw",
        build,
        kind="data.raw",
        version=1,
        params={
            "source": dataset.source,
            "fingerprint": fingerprint(dataset.source),
            "options": dict(dataset.options),
            "seed": seed,
        },
        inputs={},
    )


def shards(run: Run, name: str, dataset: Dataset, *, raw: Ref) -> Ref:
    """Webdataset shards of the rows that are fit to train on; the others are counted."""

    def build(context: BuildContext) -> Mapping[str, Any]:
        from data_prep.shards import write_shards

        assert raw is not None
        report = write_shards(
            raw.path,
            context.path,
            max_bad_ratio=dataset.max_bad_ratio,
            num_workers=dataset.num_workers,
            data_format=dataset.format,
            max_samples_per_shard=dataset.max_samples_per_shard,
        )
        counts = asdict(report)
        return {key: counts[key] for key in ("num_rows", "samples", "num_images", "dropped")}

    return run.stage(
        f"data.{name}.shards",
        build,
        kind="data.shards",
        version=1,
        params={
            "format": dataset.format,
            "max_bad_ratio": dataset.max_bad_ratio,
            "max_samples_per_shard": dataset.max_samples_per_shard,
        },
        inputs={"raw": raw},
    )


def energon(run: Run, name: str, *, shards: Ref) -> Ref:
    """The shards with energon's index and splits."""

    def build(context: BuildContext) -> None:
        from data_prep.energon import prepare

        assert shards is not None
        prepare(shards.path, context.path)

    return run.stage(
        f"data.{name}.energon",
        build,
        kind="data.energon",
        version=1,
        params={},
        inputs={"shards": shards},
    )


def holdout(run: Run, entry: Evaluate, *, raw: Ref) -> Ref:
    """Questions and expected answers of a held-out split, for one benchmark."""

    def build(context: BuildContext) -> Mapping[str, Any]:
        from data_prep.holdout import write_holdout

        assert raw is not None
        report = write_holdout(raw.path, context.path, split=entry.split, limit=entry.limit)
        return asdict(report)

    return run.stage(
        f"data.{entry.data}.{entry.benchmark}",
        build,
        kind="data.holdout",
        version=1,
        params={"split": entry.split, "limit": entry.limit},
        inputs={"raw": raw},
    )
