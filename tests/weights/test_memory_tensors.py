from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.tiny.adapters import hf_model
from tests.tiny.forms import as_hub, as_memory
from tests.tiny.models import BUILDERS
from vlmcore.weights.memory_tensors import MemoryTensors


@pytest.mark.parametrize("form", [as_hub, as_memory])
@pytest.mark.parametrize("name", BUILDERS)
def test_any_range_is_what_transformers_holds(
    name: str,
    form: Callable[[Path, Path], Path],
    tiny_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    saved = tiny_model(name)
    tensors = MemoryTensors(form(saved, tmp_path / "other"))
    for key, weight in hf_model(saved).named_parameters():
        flat = weight.detach().flatten()
        cuts = sorted({0, min(7, len(flat)), len(flat) // 4, len(flat) // 2 + 1, len(flat)})
        for first, last in zip(cuts, cuts[1:], strict=False):
            assert torch.equal(tensors.elements(key, first, last), flat[first:last]), (key, first)
