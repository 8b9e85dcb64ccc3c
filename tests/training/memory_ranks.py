"""On two ranks: how far memory rises while a model is loaded and shared out; arguments: folder of
the model, folder of a small one of the same kind, JSON file of the results in MB.

Adapters alone train, so that what is seen are the weights, not gradients and moments.
"""

import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.tiny.megatron import stage
from vlmcore.training.ranks import data_parallel_ranks
from vlmcore.training.transformers_engine import prepare

LAYOUTS = {"fsdp": {"fsdp": "fsdp2"}, "zero3": {"deepspeed": "zero3"}, "whole": {}}


def main(model: Path, small: Path, out: Path) -> None:
    results = {}
    for name, fields in LAYOUTS.items():
        told = stage(engine="transformers", tuner_type="lora", nproc_per_node=2, **fields)
        prepare(told, small)  # what libraries take is taken before
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _memory("VmRSS")
        training = prepare(told, model)
        everyone = [torch.zeros(()) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, torch.tensor(_memory("VmHWM") - before))
        results[name] = [float(rise) for rise in everyone]
        del training
        gc.collect()
    if dist.get_rank() == 0:
        out.write_text(json.dumps(results))


def _memory(name: str) -> float:
    """A line of this process's status in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name)) / 1024


if __name__ == "__main__":
    with data_parallel_ranks(num_threads=1, seed=0):
        main(*map(Path, sys.argv[1:]))
