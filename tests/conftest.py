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
