"""A dataset's stages: raw rows, webdataset shards, energon dataset, and the held-out questions."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from tasks.caching import Ref, Run
from tasks.over_dask import mapper_over_dask
from vlmcore.artifacts import BuildContext
from vlmcore.recipe.schema import Dataset, Evaluate

if TYPE_CHECKING:
    from data_prep.energon import SampleType
    from data_prep.sources import Wanted

log = logging.getLogger(__name__)

# The fields of a dataset that decide how a row is read, and those that decide what its shards hold.
ROW_FIELDS = ("format", "columns", "prompt", "media_dir", "max_chars", "group_column")
SHARD_FIELDS = (
    *ROW_FIELDS, "subset", "split", "limit", "sample", "sample_seed", "max_bad_ratio", "duplicates",
    "split_ratios", "split_by", "split_seed", "max_samples_per_shard", "max_shard_bytes",
)  # fmt: skip


def raw_dataset(run: Run, name: str, dataset: Dataset, *, seed: int) -> Ref:
    """Rows and images as the source gives them."""
    from data_prep.sources import Wanted, fetch

    stage = f"data.{name}.raw"
    wanted = Wanted.of(dataset)
    part = {key: value for key, value in asdict(wanted).items() if value}
    params = {
        "source": dataset.source, "options": dict(dataset.options), "seed": seed, **part,
    }  # fmt: skip
    pinned = _pin(run, stage, params, wanted)

    def build(context: BuildContext) -> None:
        fetch(
            dataset.source,
            context.path,
            options=dict(dataset.options),
            seed=seed,
            wanted=wanted,
            pinned=pinned,
            scratch=context.scratch,
            on_progress=partial(run.progress, stage),
        )

    return run.stage(
        stage,
        build,
        kind="data.raw",
        version=1,
        params={**params, "fingerprint": pinned},
        inputs={},
        resumable=True,  # a download goes on where it stopped
    )


def _pin(run: Run, stage: str, params: Mapping[str, Any], wanted: Wanted) -> str:
    """The source's fingerprint; of a host that does not answer, the one that the store knows.

    A plan goes on without any; the stage is then one that has to run.
    """
    from data_prep.sources import UnreachableError, fingerprint
    from vlmcore.artifacts.keys import canonical

    try:
        return fingerprint(str(params["source"]), wanted=wanted)
    except UnreachableError as error:
        for record in reversed(run.store.artifacts(stage)):
            known = dict(record.params)
            pinned = known.pop("fingerprint", None)
            if known == canonical(params):
                log.warning("%s: %s Going on with what the store has, %s.", stage, error, pinned)
                return str(pinned)
        if not run.dry:
            raise
        log.warning("%s: %s This plan cannot tell whether it is cached.", stage, error)
        return "unknown: the host cannot be reached"


def shards(run: Run, name: str, dataset: Dataset, *, raw: Ref) -> Ref:
    """Webdataset shards of the rows that are fit to train on; the others are counted.

    Interrupted, it goes on behind the last shard that was whole.
    """
    stage = f"data.{name}.shards"

    def build(context: BuildContext) -> Mapping[str, Any]:
        from data_prep.convert import convert

        assert raw is not None
        cluster = dataset.dask_scheduler
        report = convert(
            raw.path,
            context.path,
            dataset,
            work_dir=context.scratch / "shards",
            run=mapper_over_dask(cluster) if cluster else None,
            on_progress=partial(run.progress, stage),
        )
        counts = asdict(report)
        return {key: counts[key] for key in ("num_rows", "samples", "num_images", "dropped")}

    params = dataset.content_params()
    return run.stage(
        stage,
        build,
        kind="data.shards",
        version=2,
        params={key: params[key] for key in SHARD_FIELDS},
        inputs={"raw": raw},
        resumable=True,
    )


def energon(run: Run, name: str, *, shards: Ref, sample_type: SampleType = "chat") -> Ref:
    """The shards with energon's index and splits."""

    def build(context: BuildContext) -> None:
        from data_prep.energon import prepare

        assert shards is not None
        prepare(shards.path, context.path, sample_type=sample_type)

    return run.stage(
        f"data.{name}.energon",
        build,
        kind="data.energon",
        version=2,
        params={"sample_type": sample_type},
        inputs={"shards": shards},
    )


def audit(
    run: Run, name: str, dataset: Dataset, *, shards: Ref, holdouts: Sequence[Ref] = ()
) -> Ref:
    """What the shards hold, what was dropped, and what of it the evaluation would ask again."""

    def build(context: BuildContext) -> Mapping[str, Any]:
        from data_prep.audit import audit_shards
        from data_prep.audit_page import describe, write_page

        assert shards is not None
        against = {one.stage: one.path for one in holdouts if one}
        found = audit_shards(shards.path, against=against, num_workers=dataset.num_workers)
        described = describe(found)
        text = json.dumps(described, ensure_ascii=False)
        (context.path / "audit.json").write_text(text, encoding="utf-8")
        write_page(described, context.path / "audit.html", title=name)
        return found.figures()

    return run.stage(
        f"data.{name}.audit",
        build,
        kind="data.audit",
        version=1,
        params={"name": name},
        inputs={"shards": shards, "holdouts": list(holdouts)},
    )


def holdout(run: Run, entry: Evaluate, *, raw: Ref, dataset: Dataset | None = None) -> Ref:
    """Questions and expected answers of a split that the source holds out, for one benchmark."""

    def build(context: BuildContext) -> Mapping[str, Any]:
        from data_prep.convert import row_reader
        from data_prep.holdout import write_holdout
        from data_prep.tables import find_tables

        assert raw is not None
        report = write_holdout(
            raw.path,
            context.path,
            split=entry.split,
            limit=entry.limit,
            reader=row_reader(raw.path, dataset) if dataset else None,
            tables=find_tables(raw.path, subset=dataset.subset) if dataset else None,
        )
        return asdict(report)

    params = dataset.content_params() if dataset else {}
    return run.stage(
        f"data.{entry.data}.{entry.benchmark}",
        build,
        kind="data.holdout",
        version=1,
        params={
            "split": entry.split,
            "limit": entry.limit,
            **{key: params[key] for key in (*ROW_FIELDS, "subset") if key in params},
        },
        inputs={"raw": raw},
    )


def holdout_of_shards(run: Run, entry: Evaluate, *, shards: Ref) -> Ref:
    """The same of a split that `split_ratios` held out."""

    def build(context: BuildContext) -> Mapping[str, Any]:
        from data_prep.holdout import write_holdout_of_shards

        assert shards is not None
        report = write_holdout_of_shards(
            shards.path, context.path, split=entry.split, limit=entry.limit
        )
        return asdict(report)

    return run.stage(
        f"data.{entry.data}.{entry.benchmark}",
        build,
        kind="data.holdout",
        version=1,
        params={"split": entry.split, "limit": entry.limit},
        inputs={"shards": shards},
    )
