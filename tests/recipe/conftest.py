from collections.abc import Callable
from pathlib import Path

import pytest

from vlmcore.errors import RecipeError
from vlmcore.recipe import load_recipe

# Tests name its lines by number, from 1.
GOOD = """\
name: demo
seed: 7
model:
  vlm: builtin:tiny-qwen3-vl
  llm: builtin:tiny-qwen3
data:
  numbers:
    source: builtin:handwritten_numbers
    max_bad_ratio: 0.05
convert:
  tolerance: 1e-4
train:
  - name: align
    data: [numbers]
    train_iters: 100
    learning_rate: 1e-3
    freeze_vit: true
    freeze_llm: true
  - name: full
    data: [numbers]
    train_iters: 200
    nproc_per_node: 2
    global_batch_size: 8
export:
  dtype: float32
serve:
  engine: auto
evaluate:
  - benchmark: holdout
    data: numbers
    checkpoints: [align, full]
gates:
  - holdout.exact_match >= 0.9
"""

Write = Callable[..., Path]


@pytest.fixture
def good() -> str:
    return GOOD


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a recipe file (the good one, unless told otherwise) into the working folder."""
    monkeypatch.chdir(tmp_path)

    def write(text: str = GOOD, name: str = "recipe.yaml") -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def faults() -> Callable[..., list[str]]:
    """The faults that loading a recipe finds, one line each."""

    def faults(path: Path | str, *overrides: str) -> list[str]:
        with pytest.raises(RecipeError) as caught:
            load_recipe(path, overrides)
        heading, *lines = str(caught.value).splitlines()
        count = "1 fault" if len(lines) == 1 else f"{len(lines)} faults"
        assert heading == f"the recipe has {count}:"
        return [line.strip() for line in lines]

    return faults
