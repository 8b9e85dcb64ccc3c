from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vlmcore.surgery.proof import prove_swap
from vlmcore.surgery.swap import swap_llm

WEIGHTS = "model.safetensors"


class Swap:
    """Two donors and what became of them."""

    def __init__(self, vlm: Path, llm: Path, target: Path, **options: Any) -> None:
        self.vlm, self.llm, self.target = vlm, llm, target
        self.ledger = swap_llm(vlm, llm, target, **({"seed": 3} | options))

    def prove(self) -> dict:
        return prove_swap(self.target, self.vlm, self.llm, self.ledger)

    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.target / WEIGHTS)


@pytest.fixture
def swapped(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Swap]:
    """`swapped("qwen3_vl", "qwen3", hidden_size=60)`: fields are the LLM's; `vlm_fields`, `shell`
    and `seed` go elsewhere."""

    def swap(vlm: str, llm: str, *, vlm_fields: dict | None = None, **fields: Any) -> Swap:
        options = {key: fields.pop(key) for key in ("shell", "seed") if key in fields}
        donors = tiny_model(vlm, **(vlm_fields or {})), tiny_model(llm, **fields)
        return Swap(*donors, tmp_path / "swapped", **options)

    return swap
