"""On every rank: HF folders straight in and straight out, at several layouts.

Arguments: a JSON file of {case: {hf, mcore, out, layout}} and one for the results.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from vlmcore.layout import Layout
from vlmcore.models.build import build_model, load_weights
from vlmcore.models.direct import load_hf_weights, save_hf_weights
from vlmcore.training.distributed import model_parallel, process_group
from vlmcore.weights.convert import CHECKPOINT


def differing(ours: list, theirs: list) -> list[str]:
    """Names of this rank's tensors that are not the same bits."""
    return [
        name
        for one, other in zip(ours, theirs, strict=True)
        for (name, a), (_, b) in zip(
            one.state_dict().items(), other.state_dict().items(), strict=True
        )
        if isinstance(a, torch.Tensor) and not torch.equal(a, b)
    ]


def main(cases: str, results: str) -> None:
    found = {}
    with process_group(num_threads=1):
        for name, case in json.loads(Path(cases).read_text()).items():
            layout = Layout(**case["layout"])
            with model_parallel(layout, seed=0):
                direct = build_model(Path(case["hf"]), layout=layout)
                load_hf_weights(direct, Path(case["hf"]))
                converted = build_model(Path(case["hf"]), layout=layout)
                load_weights(converted, Path(case["mcore"]) / CHECKPOINT)
                mine = [differing(direct, converted)]
                everyone: list = [None] * dist.get_world_size()
                dist.all_gather_object(everyone, mine)
                save_hf_weights(direct, Path(case["hf"]), Path(case["out"]), max_shard_size="50KB")
                found[name] = sorted({key for rank in everyone for keys in rank for key in keys})
        if dist.get_rank() == 0:
            Path(results).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
