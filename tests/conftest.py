import json
from collections.abc import Callable
from pathlib import Path

import pytest

TinyModel = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Folder of a tiny model, built once: `tiny_model("qwen3_vl", tied=True)`; for reading only."""
    from vlmcore import compat

    compat.install()
    from tests.tiny.models import BUILDERS

    built: dict[str, Path] = {}

    def get(model_type: str, **options: object) -> Path:
        key = json.dumps([model_type, options], sort_keys=True)
        if key not in built:
            built[key] = BUILDERS[model_type](tmp_path_factory.mktemp(model_type), **options)
        return built[key]

    return get


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An energon dataset of 60 pictures of handwritten numbers, for reading only."""
    from data_prep.energon import prepare
    from data_prep.shards import write_shards
    from data_prep.sources import fetch

    folder = tmp_path_factory.mktemp("tiny_dataset")
    options = {"train": 60, "val": 0, "test": 4}
    fetch("builtin:handwritten_numbers", folder / "raw", options=options, seed=0)
    write_shards(
        folder / "raw",
        folder / "shards",
        max_bad_ratio=0.0,
        num_workers=1,
        max_samples_per_shard=20,
    )
    prepare(folder / "shards", folder / "energon")
    return folder / "energon"
