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


def tolerance_of(case: str) -> float:
    """Of logits in fp32.

    exaone4_5 hands its patches' rounding on the least damped. Transformers' convolution rounds four
    times as coarsely there as our product (measured against float64 on an AMD EPYC), and the logits
    that follow are up to 1.2e-5 apart.
    """
    return 2e-5 if case.startswith("exaone4_5") else 1e-5


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
