"""Several machines train one stage: each starts its ranks, which meet at the first one's address.

The machine of `node_rank` 0 runs the recipe. When a stage over several nodes begins there, every
other machine runs, on the same files,

    NODE_RANK=1 MASTER_ADDR=HOST python -m vlmcore.training.nodes JOB

with the JOB file that the first one names.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vlmcore.errors import TrainError
from vlmcore.recipe.train_stage import TrainStage

MASTER_PORT = 29500  # torchrun's own


@dataclass(frozen=True)
class Nodes:
    """Which machine of how many this is; names as torchrun's and ms-swift's."""

    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = MASTER_PORT

    def rendezvous(self) -> list[str]:
        """Torchrun's arguments."""
        if self.nnodes == 1:
            return ["--standalone"]
        return [
            "--nnodes", str(self.nnodes), "--node-rank", str(self.node_rank),
            "--master-addr", self.master_addr, "--master-port", str(self.master_port),
        ]  # fmt: skip


ONE_NODE = Nodes()


def nodes_of(stage: TrainStage, environ: Mapping[str, str] = os.environ) -> Nodes:
    """Where this machine stands: what the recipe says, else NODE_RANK, MASTER_ADDR, MASTER_PORT.

    Raises:
        TrainError: NNODES contradicts the recipe, or it is not said where to meet.
    """
    if stage.nnodes == 1:
        return ONE_NODE
    said = environ.get("NNODES")
    if said is not None and said != str(stage.nnodes):
        raise TrainError(
            f"train.{stage.name}: nnodes is {stage.nnodes}, but NNODES in the environment is "
            f"{said}; set one of them to the other"
        )
    address = stage.master_addr or environ.get("MASTER_ADDR")
    if address is None:
        raise TrainError(
            f"train.{stage.name}: nnodes is {stage.nnodes}, but it is not said where they meet; "
            f"set master_addr or MASTER_ADDR to the address of the first"
        )
    node_rank = stage.node_rank
    if node_rank is None:
        node_rank = int(environ.get("NODE_RANK", "0"))
    if node_rank >= stage.nnodes:
        raise TrainError(
            f"train.{stage.name}: node_rank {node_rank} of {stage.nnodes} nodes; they count from 0"
        )
    return Nodes(
        nnodes=stage.nnodes,
        node_rank=node_rank,
        master_addr=address,
        master_port=stage.master_port or int(environ.get("MASTER_PORT", str(MASTER_PORT))),
    )


def join(job_file: Path) -> None:
    """Trains this machine's part of a job; the first machine writes what comes of it."""
    from vlmcore.training.job import TrainJob
    from vlmcore.training.launch import launch

    job = TrainJob.model_validate_json(job_file.read_text())
    nodes = nodes_of(job.stage)
    launch(
        "vlmcore.training.main",
        ["--job", str(job_file)],
        nproc_per_node=job.stage.nproc_per_node,
        log_path=job.scratch_dir / f"node_{nodes.node_rank}.log",
        nodes=nodes,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=join.__doc__)
    parser.add_argument("job", type=Path, help="JSON of a TrainJob, on files that all nodes share")
    join(parser.parse_args().job)
