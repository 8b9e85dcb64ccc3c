"""A donor's checkpoint, asked for tensors by the names that they have in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vlmcore.families import Config, Family, family_of, read_config
from vlmcore.weights.experts import ExpertsLayout, layouts_of_experts
from vlmcore.weights.safetensors_io import SafetensorsFolder, TensorInfo

Shape = tuple[int, ...]
HEAD = "lm_head.weight"
_MATRICES = 3  # of an expert: gate, up, down


class Donor:
    """The tensors of an HF folder whose architecture has been checked, in any saved form."""

    def __init__(self, folder: Path) -> None:
        self.config: Config = read_config(folder)
        self.family: Family = family_of(self.config)
        self.model = self.family.language_model(self.config)
        self.tensors = SafetensorsFolder(folder)
        self.keys = {self.family.memory_key(key): key for key in self.tensors}
        if self.model.tied_embeddings:
            self.keys.pop(HEAD, None)  # where it is stored, it repeats the embeddings

    def info(self, key: str) -> TensorInfo | None:
        """Shape and dtype of a tensor; None where there is none."""
        return self.tensors[self.keys[key]] if key in self.keys else None

    def read(self, key: str) -> Tensor:
        """One tensor, mapped from its file."""
        return self.tensors.read(self.keys[key])

    def experts(self) -> list[ExpertsLayout]:
        """How each layer's experts are stored; empty for a dense model."""
        shapes = {key: self.tensors[disk].shape for key, disk in self.keys.items()}
        return layouts_of_experts(self.family, self.config, shapes)


@dataclass(frozen=True)
class ExpertLayer:
    """One layer's experts: how the donor stores them, and how the swapped model does."""

    donor: Donor
    source: ExpertsLayout
    target: ExpertsLayout
    num_experts: int

    def sources_of(self, key: str) -> tuple[str, ...]:
        """The donor's tensors that the swapped model's tensor `key` is made of."""
        index = self.target.keys.index(key)
        whole = [
            (expert, matrix)
            for expert in range(self.num_experts)
            for matrix in ((0, 1), (2,))[index % 2]
        ]
        made_of = [divmod(index, _MATRICES)] if self.target.per_expert else whole
        return tuple(dict.fromkeys(self._source(*one) for one in made_of))

    def read(self, key: str) -> Tensor:
        """The tensor `key` of the swapped model."""
        index = self.target.keys.index(key)
        if self.target.per_expert:
            return self._matrix(*divmod(index, _MATRICES))
        matrices = [
            self._matrix(expert, 2)
            if index
            else torch.cat([self._matrix(expert, 0), self._matrix(expert, 1)])
            for expert in range(self.num_experts)
        ]
        stacked = torch.stack(matrices)
        return stacked.transpose(1, 2) if self.target.input_first else stacked

    def _source(self, expert: int, matrix: int) -> str:
        if self.source.per_expert:
            return self.source.keys[_MATRICES * expert + matrix]
        return self.source.keys[matrix // 2]

    def _matrix(self, expert: int, matrix: int) -> Tensor:
        """Gate (0), up (1) or down (2) of one expert, output dimension first."""
        tensor = self.donor.read(self._source(expert, matrix))
        if self.source.per_expert:
            return tensor
        one = tensor[expert].T if self.source.input_first else tensor[expert]
        return one if matrix == 2 else one.chunk(2)[matrix]
