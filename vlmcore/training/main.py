"""What torchrun starts on every rank: `torchrun -m vlmcore.training.main --job FILE`.

Megatron's checkpoint writer starts a helper process that imports this module once more, so torch
and Megatron are imported in `main` alone.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path

from vlmcore.errors import VlmflowError
from vlmcore.training.job import TrainJob
from vlmcore.training.progress import report_error


def main() -> None:
    """Runs the job; a user's error is reported as one line and ends with exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", type=Path, required=True, help="JSON of a TrainJob")
    job = TrainJob.model_validate_json(parser.parse_args().job.read_text())
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("vlmcore.dataloading").setLevel(logging.INFO)  # which samples are dropped
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*")
    warnings.filterwarnings("ignore", category=FutureWarning)
    # transformers' generation (5.19) imports it where it is, and with it scipy and pandas
    sys.modules["sklearn"] = None  # type: ignore[assignment]
    try:
        _run(job)
    except VlmflowError as error:
        report_error(sentence(error))
        sys.exit(2)


def _run(job: TrainJob) -> None:
    stage = job.stage
    if stage.engine == "transformers":
        from vlmcore.training.loop import train
        from vlmcore.training.ranks import data_parallel_ranks

        with data_parallel_ranks(num_threads=stage.num_threads, seed=stage.seed):
            train(job)
        return
    from vlmcore import megatron_cpu

    megatron_cpu.install()  # before anything else imports Megatron
    from vlmcore.training.distributed import model_parallel, process_group

    with (
        process_group(num_threads=stage.num_threads),
        model_parallel(stage.layout, seed=stage.seed),
    ):
        from vlmcore.training.loop import train

        train(job)


def sentence(error: VlmflowError) -> str:
    """What an error says; torch puts the traceback of a loader's process before it."""
    kind = type(error)
    return str(error).rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip()


if __name__ == "__main__":
    main()
