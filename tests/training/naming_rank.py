"""On one rank: names of the Megatron models' parameters; arguments: JSON file, HF folders."""

import json
import sys
from pathlib import Path

from vlmcore.layout import Layout
from vlmcore.models.build import build_model
from vlmcore.training.distributed import model_parallel, process_group
from vlmcore.training.freezing import named_globally


def main(out: Path, folders: list[Path]) -> None:
    names = {}
    for folder in folders:
        with model_parallel(Layout(), seed=0):
            (model,) = build_model(folder)
            names[str(folder)] = [name for name, _, _ in named_globally(model)]
            del model
    out.write_text(json.dumps(names))


if __name__ == "__main__":
    with process_group(num_threads=1):
        main(Path(sys.argv[1]), [Path(folder) for folder in sys.argv[2:]])
