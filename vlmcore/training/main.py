"""What torchrun starts on every rank: `torchrun -m vlmcore.training.main --job FILE`."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*")

from vlmcore.errors import VlmflowError  # noqa: E402
from vlmcore.training.distributed import model_parallel, process_group  # noqa: E402
from vlmcore.training.job import TrainJob  # noqa: E402
from vlmcore.training.progress import report_error  # noqa: E402


def main() -> None:
    """Runs the job; a user's error is reported as one line and ends with exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", type=Path, required=True, help="JSON of a TrainJob")
    job = TrainJob.model_validate_json(parser.parse_args().job.read_text())
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning)
    stage = job.stage
    try:
        with (
            process_group(num_threads=stage.num_threads),
            model_parallel(
                tensor_model_parallel_size=stage.tensor_model_parallel_size, seed=stage.seed
            ),
        ):
            from vlmcore.training.loop import train

            train(job)
    except VlmflowError as error:
        report_error(str(error))
        sys.exit(2)


if __name__ == "__main__":
    main()
