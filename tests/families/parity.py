"""On every rank: the precision test of several models; arguments: pairs, results, layouts."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from vlmcore.training.distributed import process_group
from vlmcore.training.precision import precision_test


def main(pairs: str, out: str, *layouts: str) -> None:
    results = {}
    with process_group(num_threads=1):
        for case, (hf, mcore) in json.loads(Path(pairs).read_text()).items():
            rows = precision_test(
                Path(hf), Path(mcore), layouts=[int(size) for size in layouts], tolerance=1e-5
            )
            results[case] = [{**asdict(row), "passed": row.passed} for row in rows]
        if dist.get_rank() == 0:
            Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
