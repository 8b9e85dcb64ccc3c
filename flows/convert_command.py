"""`vlmflow convert`: a checkpoint from one form into another, from the shell."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from flows.json_output import print_json

if TYPE_CHECKING:
    from vlmcore.layout import Layout

convert_app = typer.Typer(
    help="Move weights between HF safetensors and Megatron-Core torch_dist; merge adapters.",
    no_args_is_help=True,
)
console = Console(stderr=True)

TOLERANCE = 1e-4  # fp32 sums in another order differ by about 1e-6 at logits near 1

Source = Annotated[Path, typer.Argument(metavar="SRC", help="Folder to read.")]
Target = Annotated[Path, typer.Argument(metavar="DST", help="Folder to write; not there yet.")]
NprocOption = Annotated[
    int | None, typer.Option(min=1, help="Worker processes; default one a core, 8 at most.")
]
DtypeOption = Annotated[
    Literal["bfloat16", "float16", "float32"] | None,
    typer.Option(help="Dtype of all tensors; default: as they are stored."),
]
CheckOption = Annotated[
    bool,
    typer.Option(
        "--check", help=f"Compare HF and Megatron-Core logits in fp32; tolerance {TOLERANCE}."
    ),
]
ShardOption = Annotated[
    str, typer.Option(metavar="SIZE", help="Data of one safetensors file at most.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the report on stdout.")]


@convert_app.command("to-mcore")
def to_mcore_command(
    source: Source,
    target: Target,
    nproc: NprocOption = None,
    dtype: DtypeOption = None,
    check: CheckOption = False,
    tp: Annotated[int, typer.Option(min=1, help="Tensor parallel size of the check.")] = 1,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline parallel size of the check.")] = 1,
    vpp: Annotated[int, typer.Option(min=1, help="Model chunks a pipeline stage.")] = 1,
    ep: Annotated[int, typer.Option(min=1, help="Expert parallel size of the check.")] = 1,
    etp: Annotated[int, typer.Option(min=1, help="Tensor parallel size of the experts.")] = 1,
    json_: JsonOption = False,
) -> None:
    """HF safetensors to a Megatron-Core checkpoint, loadable at any parallel layout.

    Interrupted, the same command continues where it stopped. Exit code 1: the check failed.
    """
    from vlmcore.layout import Layout
    from vlmcore.weights.convert import to_mcore

    if check and dtype is not None:
        raise typer.BadParameter(
            "it compares with SRC as stored; leave --dtype out", param_hint="--check"
        )
    layout = Layout(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )
    with _progress("to-mcore") as hear:
        report = to_mcore(source, target, dtype=dtype, num_processes=nproc, on_progress=hear)
    if check:
        report["precision"] = _precision(source, target, layout=layout, out=target, dtype=None)
    _finish(report, target, json_=json_)


@convert_app.command("to-hf")
def to_hf_command(
    source: Source,
    target: Target,
    max_shard_size: ShardOption = "4GB",
    nproc: NprocOption = None,
    dtype: DtypeOption = None,
    check: CheckOption = False,
    json_: JsonOption = False,
) -> None:
    """A Megatron-Core checkpoint, whatever layout wrote it, to HF safetensors.

    Interrupted, the same command continues where it stopped. Exit code 1: the check failed.
    """
    from vlmcore.layout import Layout
    from vlmcore.weights.convert import to_hf

    _require_size(max_shard_size)
    with _progress("to-hf") as hear:
        report = to_hf(
            source, target, dtype=dtype, max_shard_size=max_shard_size, num_processes=nproc,
            on_progress=hear,
        )  # fmt: skip
    if check:
        report["precision"] = _precision(target, source, layout=Layout(), out=target, dtype=dtype)
    _finish(report, target, json_=json_)


@convert_app.command("merge-lora")
def merge_lora_command(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="HF folder of the base model.")],
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="Folder of a peft or a Megatron adapter.")
    ],
    target: Target,
    max_shard_size: ShardOption = "4GB",
    json_: JsonOption = False,
) -> None:
    """A base and its LoRA adapter as one HF model; every matrix of the adapter finds its tensor."""
    from vlmcore.weights.adapters import McoreAdapter, PeftAdapter
    from vlmcore.weights.merge import merge_adapter

    _require_size(max_shard_size)
    peft = (adapter / "adapter_model.safetensors").is_file()
    source = PeftAdapter(base, adapter) if peft else McoreAdapter(base, adapter)
    with console.status("merging …"):
        report = merge_adapter(base, source, target, max_shard_size=max_shard_size)
    if json_:
        print_json(report)
    console.print(
        f"{target}: {report['keys_written']} tensors, {len(report['merged'])} of them changed",
        highlight=False,
        soft_wrap=True,
    )


def _require_size(max_shard_size: str) -> None:
    from vlmcore.weights.safetensors_io import parse_size

    try:
        parse_size(max_shard_size)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--max-shard-size") from None


@contextlib.contextmanager
def _progress(name: str) -> Iterator[Any]:
    """A bar on stderr; gives what hears (bytes done, bytes in all)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=32),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _precision(
    hf_dir: Path, mcore_dir: Path, *, layout: Layout, out: Path, dtype: str | None
) -> list[dict[str, Any]]:
    from vlmcore.training.launch import run_precision_test

    with console.status("comparing logits …"):
        return run_precision_test(
            hf_dir,
            mcore_dir,
            layouts=[layout],
            tolerance=TOLERANCE,
            log_path=out.with_name(f"{out.name}.precision.log"),
            out=out / "precision.json",
            round_to=dtype or "float32",
        )


def _finish(report: dict[str, Any], target: Path, *, json_: bool) -> None:
    """Prints the report.

    Raises:
        typer.Exit: With code 1, where the precision test failed.
    """
    if json_:
        print_json(report)
    rate = report["bytes"] / max(report["seconds"], 1e-3) / 1e9
    again = f", {report['resumed']} units were there already" if report["resumed"] else ""
    console.print(
        f"{target}: {report['keys_read']} tensors read, {report['keys_written']} written, "
        f"{report['bytes'] / 1e9:.2f} GB in {report['seconds']:.1f} s ({rate:.2f} GB/s){again}",
        highlight=False,
        soft_wrap=True,
    )
    rows = report.get("precision", [])
    for row in rows:
        verdict = "[green]passed[/]" if row["passed"] else "[bold red]failed[/]"
        console.print(
            f"{verdict}  {row['layout']}, {row['sample']}: largest logit difference "
            f"{row['max_diff']:.3g}, tolerance {row['tolerance']:.3g}"
            + (f"; first apart at {row['diverges_at']}" if row["diverges_at"] else ""),
            highlight=False,
        )
    if not all(row["passed"] for row in rows):
        raise typer.Exit(1)
