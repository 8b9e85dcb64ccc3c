"""Two agents on loopback as two machines; and where a machine learns which one it is."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny.jobs import MODULE, metrics, run_job, write_job
from tests.tiny.megatron import stage
from vlmcore import compat, proc
from vlmcore.errors import TrainError
from vlmcore.training.launch import launch
from vlmcore.training.nodes import ONE_NODE, Nodes, nodes_of

TWO = {"nnodes": 2, "nproc_per_node": 1}


def test_what_the_recipe_leaves_out_comes_from_the_environment() -> None:
    environ = {"NODE_RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "1234", "NNODES": "2"}
    assert nodes_of(stage(**TWO), environ) == Nodes(2, 1, "first", 1234)
    said = stage(**TWO, node_rank=0, master_addr="said", master_port=99)
    assert nodes_of(said, environ) == Nodes(2, 0, "said", 99)
    assert nodes_of(stage(**TWO), {"MASTER_ADDR": "first"}) == Nodes(2, 0, "first", 29500)


def test_a_stage_of_one_node_asks_nobody() -> None:
    assert nodes_of(stage(), {"NNODES": "4", "NODE_RANK": "3"}) == ONE_NODE


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"NNODES": "3", "MASTER_ADDR": "first"}, "nnodes is 2, but NNODES"),
        ({}, "not said where they meet"),
        ({"NODE_RANK": "2", "MASTER_ADDR": "first"}, "node_rank 2 of 2 nodes"),
    ],
)
def test_a_contradiction_or_a_gap_is_named(environ: dict[str, str], named: str) -> None:
    with pytest.raises(TrainError, match=named):
        nodes_of(stage(**TWO), environ)


def test_batches_are_dealt_over_the_ranks_of_all_nodes() -> None:
    wanted = stage(nnodes=2, nproc_per_node=2, global_batch_size=8, tensor_model_parallel_size=2)
    assert (wanted.num_ranks, wanted.data_parallel_size, wanted.num_micro_batches) == (4, 2, 4)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in metrics(folder)]


@pytest.mark.slow
def test_two_nodes_train_as_one_with_as_many_ranks(
    tiny_model: Callable[..., Path], tiny_dataset: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    fields = {"model_dir": tiny_model("qwen3_vl"), "dataset": tiny_dataset, "train_iters": 3}
    run_job(one, **fields)

    port = proc.free_port()
    write_job(two, **fields, **TWO, master_addr="127.0.0.1", master_port=port)
    job = str(two / "job.json")
    command = [sys.executable, "-m", "vlmcore.training.nodes", job]
    env = compat.child_env() | {"NODE_RANK": "1"}
    with subprocess.Popen(command, env=env) as second:
        launch(
            MODULE,
            ["--job", job],
            nproc_per_node=1,
            log_path=two / "log",
            nodes=Nodes(2, 0, "127.0.0.1", port),
        )
        assert second.wait(timeout=60) == 0
    assert losses(two) == losses(one)
    assert len(set(losses(one))) == 3
    assert (two / "output" / "model.safetensors").exists()
