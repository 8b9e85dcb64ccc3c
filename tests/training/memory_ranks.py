"""On two ranks: how far memory rises while a model is loaded and shared out, and what a step logs
where rank 1 takes more; arguments: folder of the model, folder of a small one of the same kind,
JSON file of the results in MB.

Adapters alone train, so that what is seen are the weights, not gradients and moments.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.tiny.megatron import stage
from vlmcore.training.ranks import data_parallel_ranks
from vlmcore.training.throughput import peak_memory_mb, sums_and_memory
from vlmcore.training.transformers_engine import prepare

LAYOUTS = {"fsdp": {"fsdp": "fsdp2"}, "zero3": {"deepspeed": "zero3"}, "whole": {}}


def main(model: Path, small: Path, out: Path) -> None:
    results = _logged()
    for name, fields in LAYOUTS.items():
        told = stage(engine="transformers", tuner_type="lora", nproc_per_node=2, **fields)
        prepare(told, small)  # what libraries take is taken before
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _memory("VmRSS")
        training = prepare(told, model)
        results[name] = _of_all(_memory("VmHWM") - before)
        del training
        gc.collect()
    if dist.get_rank() == 0:
        out.write_text(json.dumps(results))


def _logged() -> dict[str, Any]:
    """What each rank takes at most, and what both then know."""
    if dist.get_rank() == 1:
        torch.ones(100_000_000)  # 400 MB
    sums, largest = sums_and_memory(torch.tensor([2.0, dist.get_rank()], dtype=torch.float64))
    return {
        "sums": sums.tolist(),
        "largest": _of_all(largest),
        "own": _of_all(peak_memory_mb()),
    }


def _of_all(figure: float) -> list[float]:
    everyone: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(everyone, figure)
    return everyone


def _memory(name: str) -> float:
    """A line of this process's status in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name)) / 1024


if __name__ == "__main__":
    with data_parallel_ranks(num_threads=1, seed=0):
        main(*map(Path, sys.argv[1:]))
