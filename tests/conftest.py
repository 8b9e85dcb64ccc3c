import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.training.step_figures")  # a failed assert tells its figures

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


@pytest.fixture(params=["own", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A test with our compiled kernels, where they compile, and one with torch's."""
    from vlmcore.kernels import compiled

    name: str = request.param
    if name == "torch":
        monkeypatch.setattr(compiled, "library", lambda: None)
    elif compiled.library() is None:
        pytest.skip("no C++ compiler, or no AVX-512")
    return name


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An energon dataset of 60 pictures of handwritten numbers, for reading only."""
    from tests.tiny.datasets import numbers_dataset

    return numbers_dataset(tmp_path_factory.mktemp("tiny_dataset"), train=60)
