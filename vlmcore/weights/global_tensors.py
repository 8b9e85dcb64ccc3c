"""An HF folder seen as Megatron's global tensors: boxes are read and transformed when asked for.

The same rows that fill a torch_dist checkpoint fill a rank directly, without the files between.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from vlmcore.errors import WeightError
from vlmcore.families import family_of, read_config
from vlmcore.weights.architecture import check_against_architecture
from vlmcore.weights.boxes import VOCABULARY, overlap, window
from vlmcore.weights.plan import Plan, Region, Source, build_plan
from vlmcore.weights.safetensors_io import SafetensorsFolder

Shape = tuple[int, ...]


class HFGlobalTensors:
    """Reads boxes of Megatron's global tensors out of an HF model folder.

    Args:
        folder: HF folder with config.json and safetensors.

    Raises:
        WeightError: The checkpoint differs from its architecture, or the weight map does not
            account for every tensor.
    """

    def __init__(self, folder: Path) -> None:
        check_against_architecture(folder)
        config = read_config(folder)
        self.folder = folder
        self.tensors = SafetensorsFolder(folder)
        self.plan: Plan = build_plan(family_of(config), config, self.tensors.shapes)
        self._regions: dict[str, list[Region]] = defaultdict(list)
        for region in self.plan.regions:
            self._regions[region.mcore_key].append(region)

    def read(self, key: str, offset: Shape, shape: Shape, *, dtype: torch.dtype) -> Tensor:
        """One box of a global tensor; rows that only pad the vocabulary are zero.

        Raises:
            WeightError: No tensor of that name, or the HF tensors do not cover the box.
        """
        if key not in self._regions:
            raise WeightError(f"{self.folder}: nothing maps to {key}, which the model asks for")
        box = torch.zeros(shape, dtype=dtype)
        covered = 0
        for region in self._regions[key]:
            common = overlap(offset, shape, region.offset, region.shape)
            if common is None:
                continue
            low, high = common
            stored = region.pack(*(self._piece(source) for source in region.sources))
            piece = stored[window(low, high, region.offset)]
            box[window(low, high, offset)] = piece.to(dtype)
            covered += piece.numel()
        expected = self._expected(key, offset, shape)
        if covered != expected:
            raise WeightError(
                f"{self.folder}: {key} at {offset}: {covered} of {expected} elements have a source"
            )
        return box

    def _piece(self, source: Source) -> Tensor:
        tensor = self.tensors.read(source.key)
        return tensor if source.index is None else tensor[source.index]

    def _expected(self, key: str, offset: Shape, shape: Shape) -> int:
        """Elements of the box that are no padding."""
        if not key.endswith(VOCABULARY):
            return torch.Size(shape).numel()
        rows = min(offset[0] + shape[0], self._regions[key][0].global_shape[0]) - offset[0]
        return max(rows, 0) * torch.Size(shape[1:]).numel()
