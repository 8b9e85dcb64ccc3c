"""On every rank: the precision test of several models; arguments: JSON of cases, JSON of results.

A case is the name of a pair of folders (`hf`, `mcore`) and the `layouts` to compare them at.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from vlmcore.layout import Layout
from vlmcore.training.distributed import process_group
from vlmcore.training.precision import precision_test

ROUNDED_MORE = ("qwen3_vl", "qwen3_vl_moe", "exaone4_5")


def tolerance_of(case: str) -> float:
    """Of logits in fp32.

    Models with deepstack have twice the layers here: transformers in fp32 is 6e-6 from itself in
    float64 on text alone (a test of the parity's), so two orders of adding up may be twice that
    apart. exaone4_5 hands its patches' rounding on the least damped, and transformers' convolution
    rounds four times as coarsely there as our product (against float64, on an AMD EPYC).
    """
    return 2e-5 if case.startswith(ROUNDED_MORE) else 1e-5


def main(cases: dict[str, dict[str, Any]], out: Path) -> None:
    results = {}
    for name, case in cases.items():
        layouts = [Layout(**sizes) for sizes in case["layouts"]]
        rows = precision_test(
            Path(case["hf"]),
            Path(case["mcore"]),
            layouts=layouts,
            tolerance=tolerance_of(name),
        )
        results[name] = [row.row() for row in rows]
    if dist.get_rank() == 0:
        out.write_text(json.dumps(results))


if __name__ == "__main__":
    with process_group(num_threads=1):
        main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
