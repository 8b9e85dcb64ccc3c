"""Starts rank processes under torchrun and hears what they say; nothing here imports torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlmcore import compat, proc
from vlmcore.errors import ProcessError, TrainError
from vlmcore.layout import Layout, ranks_for
from vlmcore.training.nodes import ONE_NODE, Nodes
from vlmcore.training.progress import parse_error, parse_progress
from vlmcore.training.rank_failure import RankFailures

Progress = Callable[[dict[str, Any]], None]

# glibc gives large blocks back as soon as they are free, and takes new pages for the next: in every
# step on a CPU, page faults that cost more than what they save
_KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_MMAP_THRESHOLD_": str(2**25)}


def launch(
    module: str,
    arguments: Sequence[str],
    *,
    nproc_per_node: int,
    log_path: Path,
    on_progress: Progress | None = None,
    nodes: Nodes = ONE_NODE,
) -> None:
    """Runs `python -m module` on every rank to its end; the whole output goes to `log_path`.

    Args:
        module: Entry module of the ranks.
        arguments: Its command line.
        nproc_per_node: Ranks on this machine.
        log_path: Where the output goes.
        nodes: Which machine of how many this is.
        on_progress: Gets the values of each progress line.

    Raises:
        TrainError: A rank reported an error that is the user's to mend.
        ProcessError: A rank died; the message carries its traceback, or the end of the output.
    """
    errors: list[str] = []
    failures = RankFailures()

    def hear(line: str) -> None:
        failures.hear(line)
        if (values := parse_progress(line)) is not None:
            if on_progress is not None:
                on_progress(values)
        elif (error := parse_error(line)) is not None:
            errors.append(error)

    command, extra = _command(module, arguments, nproc_per_node=nproc_per_node, nodes=nodes)
    env = _KEEP_MEMORY | compat.child_env() | extra
    try:
        proc.run_logged(command, log_path=log_path, on_line=hear, env=env)
    except proc.ChildFailedError as failure:
        if errors:
            raise TrainError(errors[0]) from failure
        if cause := failures.cause():
            raise ProcessError(
                f"{module}: a rank died (whole output: {log_path}):\n{cause}"
            ) from failure
        raise


def _command(
    module: str, arguments: Sequence[str], *, nproc_per_node: int, nodes: Nodes
) -> tuple[list[str], dict[str, str]]:
    """What starts the ranks, and its extra environment."""
    # one rank needs no launcher, which would import torch once more
    if nodes.nnodes == nproc_per_node == 1:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        alone["MASTER_PORT"] = str(proc.free_port())
        return [sys.executable, "-m", module, *arguments], alone
    torchrun = ["-m", "torch.distributed.run", *nodes.rendezvous()]
    ranks = ["--nproc-per-node", str(nproc_per_node)]
    return [sys.executable, *torchrun, *ranks, "-m", module, *arguments], {}


def run_precision_test(
    hf_dir: Path,
    mcore_dir: Path,
    *,
    layouts: Sequence[Layout],
    tolerance: float,
    log_path: Path,
    out: Path,
    round_to: str = "float32",
) -> list[dict[str, Any]]:
    """Runs the precision test on as many ranks as its layouts need.

    Args:
        hf_dir: HF model folder.
        mcore_dir: Megatron model folder.
        layouts: Where to compare, such as `[Layout(), Layout(tensor_model_parallel_size=2)]`.
        tolerance: Largest absolute logit difference that passes.
        log_path: Gets the ranks' output.
        out: JSON file that gets the rows.
        round_to: Dtype that the HF folder's weights were saved in.

    Returns:
        A row per layout and sample, see `vlmcore.training.precision.PrecisionResult.row`; judging
        them is the caller's.

    Raises:
        TrainError: A layout does not divide the model.
        ProcessError: A rank died.
    """
    arguments = [
        "--hf", str(hf_dir), "--mcore", str(mcore_dir), "--out", str(out),
        "--tolerance", str(tolerance), "--round-to", round_to,
        "--layouts", json.dumps([asdict(layout) for layout in layouts]),
    ]  # fmt: skip
    launch(
        "vlmcore.training.precision",
        arguments,
        nproc_per_node=ranks_for(layouts),
        log_path=log_path,
    )
    rows: list[dict[str, Any]] = json.loads(out.read_text())
    return rows
