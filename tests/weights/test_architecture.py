import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vlmcore.weights import architecture
from vlmcore.weights.architecture import architecture_shapes, check_against_architecture

IMPORTS = """
import sys
from pathlib import Path
from vlmcore.weights.architecture import {function}
{function}(Path(sys.argv[1]))
print("transformers" in sys.modules)
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vlmflow" / "architectures"


def imports_transformers(function: str, model_dir: Path) -> bool:
    command = [sys.executable, "-c", IMPORTS.format(function=function), str(model_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {"True": True, "False": False}[done.stdout.strip().splitlines()[-1]]


def test_the_second_look_imports_nothing_heavy(
    tiny_model: Callable[..., Path], cache: Path
) -> None:
    for function in ("architecture_shapes", "check_against_architecture"):
        assert imports_transformers(function, tiny_model("qwen3_vl_moe")) == (
            function == "architecture_shapes"
        )
    assert len(list(cache.iterdir())) == 1


def test_another_config_is_another_architecture(
    tiny_model: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    copy = shutil.copytree(tiny_model("qwen3"), tmp_path / "copy")
    before = architecture_shapes(copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": 400}))
    after = architecture_shapes(copy)
    assert before["lm_head.weight"] == (321, 48)
    assert after["lm_head.weight"] == (400, 48)


def test_a_damaged_record_is_made_again(
    tiny_model: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = architecture_shapes(tiny_model("qwen3"))
    (record,) = cache.iterdir()
    record.write_text(record.read_text()[:40])
    assert architecture_shapes(tiny_model("qwen3")) == expected
    monkeypatch.setattr(architecture, "_built_shapes", None)  # not needed any more
    assert architecture_shapes(tiny_model("qwen3")) == expected


def test_a_home_that_cannot_be_written_is_no_obstacle(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    check_against_architecture(tiny_model("qwen3"))
