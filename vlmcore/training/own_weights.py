"""A transformers model without memory for its weights, and what fills the part that a rank holds.

Where ranks share a model out, none of them ever has all of it: weights begin on the meta device,
and each rank reads the elements that stay with it. What no checkpoint holds, such as rotary
frequencies, is there from the start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmcore import megatron_cpu
from vlmcore.families import Family
from vlmcore.recipe.train_stage import TrainStage
from vlmcore.weights.adapters import PREFIX
from vlmcore.weights.memory_tensors import MemoryTensors

# what peft has in the names of a model with adapters: the weights below them, the only adapter's
_BASE, _DEFAULT, _MAGNITUDE = ".base_layer", ".default", ".lora_magnitude_vector."


def build_hollow(stage: TrainStage, hf_dir: Path, family: Family) -> Any:
    """A folder's model in the stage's dtype: its buffers hold values, its weights no memory."""
    import transformers
    from accelerate import init_empty_weights

    config = transformers.AutoConfig.from_pretrained(hf_dir)
    with init_empty_weights(include_buffers=False):
        model = getattr(transformers, family.architecture)._from_config(
            config, dtype=getattr(torch, stage.torch_dtype), attn_implementation="sdpa"
        )
    model.tie_weights()
    return model


class OwnWeights:
    """The values of weights that have no memory yet, any range of them alone.

    Args:
        hf_dir: Folder that they stand in.
        dtype: What they are rounded to.

    Attributes:
        adapters: Those that stand in no folder, by the names under which peft saves them.
    """

    def __init__(self, hf_dir: Path, dtype: torch.dtype) -> None:
        self.tensors = MemoryTensors(hf_dir)
        self.dtype = dtype
        self.adapters: Mapping[str, Tensor] = {}

    def fill(self, name: str, part: Tensor, *, first: int = 0) -> None:
        """Fills a part of a weight, contiguous in it.

        Args:
            name: Of the weight in the transformers model, which may hold adapters.
            part: Gets the elements.
            first: The weight's element, counted flat, that the part begins with.
        """
        if part.numel():
            part.copy_(self._elements(name, first, first + part.numel()).view(part.shape))

    def _elements(self, name: str, first: int, last: int) -> Tensor:
        adapter = self.adapters.get(PREFIX + name.replace(_DEFAULT, ""))
        if adapter is not None:
            return adapter.flatten()[first:last]
        key, _, is_magnitude = name.replace(_BASE, "").partition(_MAGNITUDE)
        if is_magnitude:
            return self._row_norms(f"{key}.weight", first, last)
        return self.tensors.elements(key, first, last).to(self.dtype)

    def _row_norms(self, key: str, first: int, last: int) -> Tensor:
        """What DoRA's magnitudes begin as (arXiv 2402.09353): the norms of the weight's rows."""
        (columns,) = self.tensors.shape(key)[1:]
        rows = self.tensors.elements(key, first * columns, last * columns).to(self.dtype)
        return torch.linalg.norm(rows.view(-1, columns), dim=1)


def put_in(weight: nn.Parameter, values: Tensor) -> None:
    """Gives a weight its values, on whatever device; everyone who holds it sees them."""
    torch.utils.swap_tensors(weight, nn.Parameter(values, weight.requires_grad))


@contextmanager
def zeros_lent(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, weights without memory are zeros that a forward pass can go through."""
    hollow = [weight for weight in weights if weight.is_meta]
    lent = [
        nn.Parameter(torch.zeros_like(weight, device=megatron_cpu.device()), weight.requires_grad)
        for weight in hollow
    ]
    for weight, zeros in zip(hollow, lent, strict=True):
        torch.utils.swap_tensors(weight, zeros)
    try:
        yield
    finally:
        for weight, kept in zip(hollow, lent, strict=True):
            torch.utils.swap_tensors(weight, kept)
