"""`vlmflow data`: raw rows to shards, shards to an energon dataset, and what they hold."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from flows.json_output import print_json
from vlmcore.errors import DataError

data_app = typer.Typer(
    help="""Turn what you have into shards that train, and look at what is in them.

    1. `vlmflow data convert my_rows.jsonl out --format messages` checks every row and image.
    2. `vlmflow data audit out` writes a page: sizes, duplicates, leaks, samples to look at.
    3. `vlmflow data prepare out --split 9,1,0` splits and indexes them for training.

    A recipe's `data:` does the same within a run.""",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Source = Annotated[
    str,
    typer.Argument(
        help="A table (.jsonl, .json, .parquet, .csv … or webdataset .tar), a folder with tables, "
        "one a split: train.jsonl, val.jsonl, data/train-00000-of-00003.parquet …, an archive of "
        "either, or as in a recipe `hf:USER/NAME`, `modelscope:USER/NAME`, `https://…`, `s3://…`, "
        "`builtin:NAME`; `#5000` behind it: so many rows."
    ),
]
Shards = Annotated[Path, typer.Argument(help="Folder of shards that `data convert` wrote.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Workers = Annotated[
    int, typer.Option(min=1, help="Processes; their number does not change the result.")
]
Columns = Annotated[
    list[str],
    typer.Option(
        "--column", metavar="THEIRS=OURS", help="A column under another name: formula=response."
    ),
]

WORKERS = min(8, os.cpu_count() or 1)


@data_app.command()
def convert(
    src: Source,
    dst: Annotated[Path, typer.Argument(help="Folder for the shards; new or empty.")],
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="F",
            help="messages, sharegpt, llava, alpaca, query_response, text, parquet, webdataset, or "
            "auto: told by each row's columns.",
        ),
    ] = "auto",
    column: Columns = [],  # noqa: B006 - typer reads it
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub's repository.")
    ] = None,
    subset: Annotated[str | None, typer.Option(help="The source's name of a subset.")] = None,
    split: Annotated[
        str | None, typer.Option(help="The source's name of the only split to read.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Question for rows that have an answer but no question.")
    ] = None,
    media_dir: Annotated[
        str, typer.Option(help="Folder in SRC that image paths are relative to.")
    ] = "",
    group_column: Annotated[
        str | None,
        typer.Option(help="Column whose value `data prepare --split-by group` keeps together."),
    ] = None,
    duplicates: Annotated[
        str, typer.Option(help="keep; or leave out repeats: exact, perceptual.")
    ] = "keep",
    max_bad_ratio: Annotated[
        float, typer.Option(help="Share of unusable rows (0 to 1) past which nothing is written.")
    ] = 0.01,
    workers: Workers = WORKERS,
    json_: Json = False,
) -> None:
    """Check every row of SRC and write webdataset shards with the original image bytes to DST.

    What cannot be trained on is left out and counted by its cause. Killed and started again, it
    goes on behind the last whole shard.
    """
    from data_prep.in_place import convert_in_place, find_or_fetch, require_room
    from flows.terminal import progress_bar

    dataset = _dataset(
        source=src if _is_remote(src) else f"path:{src}",
        revision=revision,
        subset=subset,
        split=split,
        format=format_,
        columns=dict(_pair(text) for text in column),
        prompt=prompt,
        media_dir=media_dir,
        group_column=group_column,
        duplicates=duplicates,
        max_bad_ratio=max_bad_ratio,
        num_workers=workers,
    )
    require_room(dst)
    console = Console(stderr=True)
    with progress_bar(console, f"fetching {dataset.source}") as on_progress:
        raw_dir, tables = find_or_fetch(dst, dataset, on_progress=on_progress)
    with progress_bar(console, "checking and writing") as on_progress:
        report = convert_in_place(
            dst, dataset, raw_dir=raw_dir, tables=tables, on_progress=on_progress
        )
    num_shards = sum(map(len, report.shards.values()))
    if json_:
        print_json(
            {
                "samples": sum(report.samples.values()),
                "shards": num_shards,
                "dropped": report.dropped,
                "splits": report.samples,
                "rows": report.num_rows,
                "images": report.num_images,
                "videos": report.num_videos,
                "audios": report.num_audios,
            }
        )
        return
    splits = ", ".join(f"{split} {number:,}" for split, number in report.samples.items())
    typer.echo(f"samples: {sum(report.samples.values()):,} ({splits})")
    typer.echo(f"shards: {num_shards}")
    typer.echo(f"dropped: {sum(report.dropped.values())}")
    for cause, number in sorted(report.dropped.items(), key=lambda item: -item[1]):
        typer.echo(f"  {number:>7,}  {cause}, as {report.examples[cause][0]}")


@data_app.command()
def prepare(
    dst: Shards,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="TRAIN,VAL,TEST",
            help="Ratios to deal all samples by, such as 9,1,0; without, splits stay as they are.",
        ),
    ] = None,
    split_by: Annotated[
        str, typer.Option(help="What is never in two splits: image, sample or group.")
    ] = "image",
    seed: Annotated[int, typer.Option(min=0, help="Which sample goes to which split.")] = 0,
    sample_type: Annotated[
        str, typer.Option(help="What training reads: chat, or energon's own vqa, captioning.")
    ] = "chat",
    json_: Json = False,
) -> None:
    """Index the shards in DST for Megatron-Energon, without a question asked.

    With --split they are dealt anew first: samples that share an image stay together.
    """
    from data_prep.in_place import prepare_in_place
    from data_prep.splits import parse_split

    dataset = _dataset(
        source=f"path:{dst}",
        split_ratios=parse_split(split) if split is not None else None,
        split_by=split_by,
        group_column="group" if split_by == "group" else None,
        split_seed=seed,
        sample_type=sample_type,
    )
    report = prepare_in_place(dst, dataset)
    if json_:
        print_json({"samples": report.samples, "shards": report.shards, "path": str(dst)})
        return
    for name, number in report.samples.items():
        typer.echo(f"{name}: {number:,} samples, shards: {len(report.shards[name])}")
    typer.echo(f"energon dataset: {dst}")


@data_app.command()
def audit(
    dst: Shards,
    against: Annotated[
        list[Path],
        typer.Option(help="Other shards or a holdout that training must not have seen."),
    ] = [],  # noqa: B006
    tokenizer: Annotated[
        Path | None, typer.Option(help="Model folder whose tokenizer counts the texts' tokens.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The page to write; default DST/audit.html.")
    ] = None,
    workers: Workers = WORKERS,
    json_: Json = False,
) -> None:
    """Read every sample of DST, decode every image, and write one HTML page about them.

    What was dropped and why, exact and perceptual duplicates, sizes and lengths, 16 samples, and
    images of train that are also held out.
    """
    from data_prep.audit import audit_shards
    from data_prep.audit_page import describe, write_page

    found = audit_shards(
        dst,
        against={str(folder): folder for folder in against},
        count_tokens=_token_counter(tokenizer) if tokenizer else None,
        num_workers=workers,
    )
    page = out or dst / "audit.html"
    write_page(describe(found), page, title=dst.resolve().name)
    figures = found.figures()
    if json_:
        print_json({**figures, "page": str(page)})
        return
    for name in ("samples", "images", "dropped", "undecodable", "duplicates", "near_duplicates"):
        typer.echo(f"{name.replace('_', ' ')}: {_shown(figures[name])}")
    typer.echo(f"suspected leaks: {figures['leaks']}")
    typer.echo(f"page: {page}")


def _is_remote(src: str) -> bool:
    """Whether a source names more than a place on this machine."""
    return ":" in src and not Path(src).exists()


def _dataset(**values: Any) -> Any:
    """The section of a recipe that these options stand for."""
    from pydantic import ValidationError

    from vlmcore.recipe.schema import Dataset
    from vlmcore.recipe.section import CrossFieldError

    try:
        return Dataset(**values)
    except ValidationError as error:
        faults: list[tuple[Any, str]] = []
        for fault in error.errors():
            why = fault.get("ctx", {}).get("error")
            together = isinstance(why, CrossFieldError)
            faults += why.faults if together else [(fault["loc"], fault["msg"])]
        told = (f"--{str(path[0]).replace('_', '-')}: {text}" for path, text in faults)
        raise DataError("; ".join(told)) from error


def _pair(text: str) -> tuple[str, str]:
    theirs, equals, ours = text.partition("=")
    if not equals or not theirs or not ours:
        raise DataError(f"--column {text!r} is not THEIRS=OURS, such as formula=response.")
    return theirs, ours


def _token_counter(folder: Path) -> Any:
    import vlmcore  # noqa: F401 - its remedies come before transformers

    with contextlib.redirect_stdout(sys.stderr):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise DataError(f"{folder} holds no tokenizer: {error}") from error
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {number:,}" for key, number in value.items()) or "0"
    return f"{value:,}"
