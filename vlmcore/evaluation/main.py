"""Runs one scoring job in a process of its own: `python -m vlmcore.evaluation.main job.json`.

A process of its own because importing EvalScope takes 3 s, loads torch and replaces the handlers
of the root logger, which neither a Prefect process nor the command line should suffer, and because
a backend that hangs can be stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vlmcore.evaluation.job import Job


def main(argv: list[str]) -> None:
    """Do the job that the file describes and write its result."""
    job = Job.model_validate_json(Path(argv[0]).read_text(encoding="utf-8"))
    match job.backend:
        case "native":
            from vlmcore.evaluation import native

            native.run(job).save(job.result)


if __name__ == "__main__":
    main(sys.argv[1:])
