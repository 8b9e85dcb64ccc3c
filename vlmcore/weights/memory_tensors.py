"""An HF folder's tensors as transformers holds them in memory, in whatever form they were saved.

Any range of a tensor's elements is read alone, so a rank that holds a part of the model never sees
the rest. Differences handled here:
- names: prefixes of published checkpoints, see `Family.memory_key`;
- experts: transformers stacks `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I]. Saved expert by
  expert they stand one behind the other in it, gate before up; saved input dimension first, each
  expert is the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from vlmcore.families import family_of, read_config
from vlmcore.weights.experts import ExpertsLayout, layouts_of_experts
from vlmcore.weights.safetensors_io import SafetensorsFolder, TensorInfo, TensorReader

_FIRST = "0.gate_proj.weight"  # of a layer's experts, saved one by one


class MemoryTensors:
    """Reads ranges of tensors by their names in memory.

    Args:
        folder: HF folder whose architecture has been checked.
    """

    def __init__(self, folder: Path) -> None:
        config = read_config(folder)
        family = family_of(config)
        stored = SafetensorsFolder(folder)
        self._stored = {family.memory_key(key): info for key, info in stored.items()}
        self._pieces = {key: [info] for key, info in self._stored.items()}
        self._turned: set[str] = set()
        self._reader = TensorReader()
        shapes = {key: info.shape for key, info in self._stored.items()}
        for layout in layouts_of_experts(family, config, shapes):
            self._stack(layout)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor that is saved as it is held."""
        return self._stored[key].shape

    def elements(self, key: str, first: int, last: int) -> Tensor:
        """Elements `first` to `last` of a tensor, counted flat, in the dtype they are saved in."""
        if key in self._turned:
            return torch.cat(list(self._turned_experts(key, first, last)))
        found, start = [], 0
        for info in self._pieces[key]:
            size = math.prod(info.shape)
            low, high = max(first - start, 0), min(last - start, size)
            if low < high:
                found.append(self._read(info, low, high))
            start += size
        return found[0] if len(found) == 1 else torch.cat(found)

    def _stack(self, layout: ExpertsLayout) -> None:
        if layout.input_first:
            self._turned.update(layout.keys)
        if not layout.per_expert:
            return
        prefix = layout.keys[0].removesuffix(_FIRST)
        gate_up = [key for key in layout.keys if not key.endswith("down_proj.weight")]
        down = [key for key in layout.keys if key.endswith("down_proj.weight")]
        for name, keys in (("gate_up_proj", gate_up), ("down_proj", down)):
            self._pieces[prefix + name] = [self._stored[key] for key in keys]

    def _turned_experts(self, key: str, first: int, last: int) -> Iterator[Tensor]:
        info = self._stored[key]
        _, rows, columns = info.shape
        size = rows * columns
        for expert in range(first // size, -(-last // size)):
            start = expert * size
            saved = self._read(info, start, start + size).view(rows, columns)
            yield saved.T.reshape(-1)[max(first - start, 0) : last - start]

    def _read(self, info: TensorInfo, first: int, last: int) -> Tensor:
        return torch.from_numpy(self._reader.elements(info, first, last)).view(info.dtype)
