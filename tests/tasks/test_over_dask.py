"""Two worker processes of a Dask cluster write the very bytes that one process writes."""

import hashlib
import json

import pytest

from data_prep.convert import convert
from tasks.over_dask import mapper_over_dask
from vlmcore.recipe.schema import Dataset


def digests(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()
    }  # fmt: skip


@pytest.mark.slow
def test_a_cluster_gives_the_digest_of_one_process(tmp_path):
    from distributed import LocalCluster
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_LOGGING_TO_API_ENABLED,
        temporary_settings,
    )

    from flows.up import private_server

    raw = tmp_path / "raw"
    raw.mkdir()
    with (raw / "train.jsonl").open("w") as file:
        for i in range(500):
            turns = [{"role": "user", "content": f"{i}?"},
                     {"role": "assistant", "content": str(i) if i % 100 else ""}]  # fmt: skip
            file.write(json.dumps({"messages": turns}) + "\n")
    dataset = Dataset(source=f"path:{raw}", max_samples_per_shard=60, num_workers=1)
    alone = convert(raw, tmp_path / "alone", dataset, work_dir=tmp_path / "work1")
    with (
        private_server(home=tmp_path / "prefect", log_dir=tmp_path / "logs") as url,
        temporary_settings({PREFECT_API_URL: url, PREFECT_LOGGING_TO_API_ENABLED: False}),
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as
        cluster,
    ):  # fmt: skip
        run = mapper_over_dask(cluster.scheduler_address)
        spread = convert(raw, tmp_path / "spread", dataset, work_dir=tmp_path / "work2", run=run)
    assert spread == alone
    assert spread.dropped == {"empty_answer": 5}
    assert len(spread.shards["train"]) == 9
    assert digests(tmp_path / "spread") == digests(tmp_path / "alone")
