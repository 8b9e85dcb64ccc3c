"""LoRA adapters between peft's folders and Megatron-Core's global tensors.

An adapter belongs to one HF matrix, also where Megatron fuses several into one linear layer, so
that both directions are renamings and cuts, exact to the bit. Layout differences handled here:
- peft numbers layers in its keys; Megatron stacks them: `lora_A` [L, R, in], `lora_B` [L, out, R].
  R is the largest rank of the stack. Rows and columns above a layer's own rank are zero, and stay
  zero under training, since the gradient of each is a product with the other.
- experts: peft (0.21, on transformers 5) holds a layer's experts in `lora_A` [E · r, in], expert by
  expert, and `lora_B` [out, r · E], rank by rank; Megatron in [L, E, R, in] and [L, E, out, R].
  Gate and up share `lora_A`; their halves of `lora_B` stand apart, [L, E, 2, I, R], so that tensor
  parallel ranks cut inside each.
- adapters of one expert and projection (transformers 4) become what peft makes of them on loading:
  gate and up one below the other in `lora_A`, block-diagonal in `lora_B`.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from vlmcore.errors import WeightError
from vlmcore.families import family_of, read_config
from vlmcore.weights.adapter_plan import (
    CONFIG,
    FACTORS,
    Adapter,
    AdapterPlan,
    Factor,
    Shape,
    plan_adapters,
    read_adapter_config,
    write_adapter_config,
)
from vlmcore.weights.convert import CHECKPOINT
from vlmcore.weights.safetensors_io import SafetensorsFolder, write_sharded
from vlmcore.weights.torch_dist import BoxReader, read_checkpoint

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # peft's, before every key


class AdapterSource(ABC):
    """Adapter matrices one by one, and boxes of the global tensors that they make up."""

    def __init__(self, plan: AdapterPlan) -> None:
        self.plan = plan

    @abstractmethod
    def matrix(self, adapter: Adapter, factor: Factor, expert: int | None) -> Tensor:
        """One factor, [rank, in] or [out, rank]."""

    @abstractmethod
    def dtype(self, adapter: Adapter) -> torch.dtype:
        """The stored dtype of its factors."""

    def delta(self, adapter: Adapter, expert: int | None, *, rows: slice) -> Tensor:
        """Some rows of the update of one matrix [out, in], computed in fp32."""
        a, b = (self.matrix(adapter, factor, expert).float() for factor in FACTORS)
        return torch.mm(b[rows], a).mul_(adapter.scale)

    def read(self, key: str, offset: Shape, shape: Shape) -> Tensor:
        """One box of a global tensor; zero where a layer has no adapter or a lower rank."""
        mcore_key, _, name = key.rpartition(".lora_")
        (factor,) = (factor for factor in FACTORS if factor == name)
        stack = self.plan.stacks[mcore_key]
        sample = next(iter(stack.values()))
        dims = sample.stack
        box = torch.zeros(shape, dtype=self.dtype(sample))
        inside = tuple(slice(o, o + n) for o, n in zip(offset[dims:], shape[dims:], strict=True))
        for index in product(*(range(n) for n in shape[:dims])):
            place = [start + i for start, i in zip(offset, index, strict=False)]
            adapter = stack.get(None if sample.layer is None else place[0])
            if adapter is not None:
                expert = None if sample.num_experts is None else place[-1]
                whole = torch.zeros(self.plan.global_shapes[key][dims:], dtype=box.dtype)
                own = whole[: adapter.rank] if factor == "A" else whole[..., : adapter.rank]
                own.copy_(self.matrix(adapter, factor, expert).view(own.shape))
                box[index] = whole[inside]
        return box


class PeftAdapter(AdapterSource):
    """A folder that peft saved.

    Args:
        base_dir: HF folder of the base; its config.json is enough.
        folder: adapter_config.json and adapter_model.safetensors; keys in disk or memory form.

    Raises:
        WeightError: The folder does not fit the base: every missing, unexpected and mis-shaped
            tensor is listed.
    """

    def __init__(self, base_dir: Path, folder: Path) -> None:
        super().__init__(plan_adapters(base_dir, read_adapter_config(folder)))
        self.tensors = SafetensorsFolder(folder)
        family = family_of(read_config(base_dir))
        self._stored: dict[str, str] = {}  # name in memory without peft's prefix → key
        faults = []
        for key in self.tensors:
            name = family.memory_key(key.removeprefix(PREFIX))
            if name in self._stored:
                faults.append(f"{key}: the same tensor as {self._stored[name]}")
            self._stored[name] = key
        expected = {
            name: shape for adapter in self.plan.adapters for name, shape in self._parts(adapter)
        }
        shapes = {name: self.tensors[key].shape for name, key in self._stored.items()}
        faults += _differences(shapes, expected)
        if faults:
            raise WeightError(
                f"{folder}: {len(faults)} tensor(s) differ from what {CONFIG} asks for on the base "
                f"{base_dir}; an adapter fits only the base it was trained on:\n  "
                + "\n  ".join(faults)
            )

    def matrix(self, adapter: Adapter, factor: Factor, expert: int | None) -> Tensor:  # noqa: D102
        if adapter.num_experts is not None and self._is_by_expert(adapter):
            parts = [
                self._read(f"{_experts(adapter)}.{expert}.{projection}.lora_{factor}.weight")
                for projection in _projections(adapter)
            ]
            return torch.cat(parts) if factor == "A" else torch.block_diag(*parts)
        stored = self._read(f"{adapter.peft_name}.lora_{factor}.weight")
        if expert is None:
            return stored
        if factor == "A":
            return stored.view(-1, adapter.rank, adapter.in_features)[expert]
        return stored.view(adapter.out_features, adapter.rank, -1)[..., expert].contiguous()

    def dtype(self, adapter: Adapter) -> torch.dtype:  # noqa: D102
        name, _ = self._parts(adapter)[0]
        return self.tensors[self._stored[name]].dtype

    def _read(self, name: str) -> Tensor:
        return self.tensors.read(self._stored[name])

    def _is_by_expert(self, adapter: Adapter) -> bool:
        return f"{_experts(adapter)}.0.{_projections(adapter)[0]}.lora_A.weight" in self._stored

    def _parts(self, adapter: Adapter) -> list[tuple[str, Shape]]:
        """Name and shape of the adapter's tensors in this folder."""
        count = adapter.num_experts
        if count is None or not self._is_by_expert(adapter):
            rank = adapter.rank * (count or 1)
            return [(f"{adapter.peft_name}.lora_{factor}.weight", adapter.shape(factor, rank))
                    for factor in FACTORS]  # fmt: skip
        projections = _projections(adapter)
        rank, rows = (n // len(projections) for n in (adapter.rank, adapter.out_features))
        shapes: dict[Factor, Shape] = {"A": (rank, adapter.in_features), "B": (rows, rank)}
        return [
            (f"{_experts(adapter)}.{expert}.{projection}.lora_{factor}.weight", shapes[factor])
            for expert, projection, factor in product(range(count), projections, FACTORS)
        ]


class McoreAdapter(AdapterSource):
    """A Megatron adapter folder: `checkpoint/` (torch_dist, any layout) and adapter_config.json.

    Raises:
        WeightError: The checkpoint does not fit config and base; every difference is listed.
    """

    def __init__(self, base_dir: Path, folder: Path) -> None:
        super().__init__(plan_adapters(base_dir, read_adapter_config(folder)))
        stored = read_checkpoint(folder / CHECKPOINT)
        shapes = {key: stored[key].shape for key in stored if not key.startswith("optimizer.")}
        faults = _differences(shapes, self.plan.global_shapes)
        if faults:
            raise WeightError(
                f"{folder}: {len(faults)} tensor(s) differ from what {CONFIG} asks for on the base "
                f"{base_dir}:\n  " + "\n  ".join(faults)
            )
        self._stored = stored
        self._reader = BoxReader()

    def matrix(self, adapter: Adapter, factor: Factor, expert: int | None) -> Tensor:  # noqa: D102
        tensor = self._stored[f"{adapter.mcore_key}.lora_{factor}"]
        index = tuple(i for i in (adapter.layer, expert) if i is not None)
        rest = tensor.shape[len(index) :]
        offset, shape = (*index, *(0 for _ in rest)), (*(1 for _ in index), *rest)
        box = self._reader.read(tensor.within(offset, shape), offset, shape)
        matrix = torch.from_numpy(box.copy()).view(getattr(torch, tensor.dtype))
        if factor == "A":
            return matrix.view(-1, adapter.in_features)[: adapter.rank]
        return matrix.view(adapter.out_features, -1)[:, : adapter.rank].contiguous()

    def dtype(self, adapter: Adapter) -> torch.dtype:  # noqa: D102
        dtype: torch.dtype = getattr(torch, self._stored[f"{adapter.mcore_key}.lora_A"].dtype)
        return dtype


class FreshAdapter(AdapterSource):
    """An untrained adapter: A uniform as in peft (Kaiming with a = √5), B zero.

    Drawn matrix by matrix, so that every parallel layout begins with the same numbers.
    """

    def __init__(self, plan: AdapterPlan, *, seed: int) -> None:
        super().__init__(plan)
        self.seed = seed

    def matrix(self, adapter: Adapter, factor: Factor, expert: int | None) -> Tensor:  # noqa: D102
        matrix = torch.zeros(adapter.shape(factor, adapter.rank))
        if factor == "A":
            name = f"{self.seed} {adapter.hf_key} {expert}"
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            bound = 1 / math.sqrt(adapter.in_features)
            matrix.uniform_(-bound, bound, generator=generator)
        return matrix

    def dtype(self, adapter: Adapter) -> torch.dtype:  # noqa: D102
        return torch.float32


def write_peft(source: AdapterSource, target: Path) -> None:
    """Writes an adapter as peft saves it, for `PeftModel.from_pretrained` and for servers.

    Args:
        source: Any adapter.
        target: New folder; gets adapter_model.safetensors and adapter_config.json.
    """
    homes = {
        f"{PREFIX}{adapter.peft_name}.lora_{factor}.weight": (adapter, factor)
        for adapter in source.plan.adapters
        for factor in FACTORS
    }

    def read(key: str) -> Tensor:
        adapter, factor = homes[key]
        parts = [source.matrix(adapter, factor, expert) for expert in adapter.experts]
        return torch.cat(parts) if factor == "A" else torch.stack(parts, dim=-1).flatten(1)

    tensors = {
        key: (adapter.shape(factor, adapter.rank * (adapter.num_experts or 1)),
              source.dtype(adapter))
        for key, (adapter, factor) in homes.items()
    }  # fmt: skip
    size_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors.values())
    target.mkdir(parents=True)
    (file,) = write_sharded(target, tensors, read, max_shard_bytes=size_bytes)
    file.rename(target / WEIGHTS)
    write_adapter_config(source.plan, target)


def _experts(adapter: Adapter) -> str:
    """Name of the module that holds the experts; peft wraps it once for each of its tensors."""
    return adapter.hf_key.rpartition(".")[0]


def _projections(adapter: Adapter) -> tuple[str, ...]:
    return ("gate_proj", "up_proj") if adapter.gate_and_up else ("down_proj",)


def _differences(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> list[str]:
    faults = [f"{key}: missing, expected {expected[key]}" for key in sorted({*expected} - {*found})]
    faults += [f"{key}: unexpected, found {found[key]}" for key in sorted({*found} - {*expected})]
    faults += [
        f"{key}: shape {found[key]}, expected {expected[key]}"
        for key in sorted({*expected} & {*found})
        if found[key] != expected[key]
    ]
    return faults
