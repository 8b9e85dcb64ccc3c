"""A base and its adapter as one HF model: W + scale · B · A, tensor by tensor.

The sum is computed in fp32 and rounded to the base's dtype once. Beside the tensor in work only
its adapter is in memory.
"""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from vlmcore.errors import WeightError
from vlmcore.families import family_of, read_config
from vlmcore.weights.adapter_plan import Adapter
from vlmcore.weights.adapters import AdapterSource
from vlmcore.weights.architecture import check_against_architecture
from vlmcore.weights.plan import Region, build_plan
from vlmcore.weights.safetensors_io import SafetensorsFolder, parse_size, write_sharded
from vlmcore.weights.sidecar import copy_sidecar, leave_quantization_out


def merge_adapter(
    base_dir: Path, source: AdapterSource, target: Path, *, max_shard_size: str = "4GB"
) -> dict[str, object]:
    """Writes the merged model as an HF folder, in the base's keys and dtypes.

    Args:
        base_dir: HF folder of the base.
        source: `PeftAdapter`, or `McoreAdapter` for one that Megatron trained.
        target: New folder; takes its name once it is whole.
        max_shard_size: Data of one safetensors file at most, such as 4GB.

    Returns:
        `keys_written`, and `merged`: the keys of the tensors that changed.

    Raises:
        WeightError: The base differs from its architecture, an adapter finds no tensor in it, or
            the target is there.
    """
    if target.exists():
        raise WeightError(f"{target} exists; remove it or name another folder")
    merger = _Merger(base_dir, source)
    tensors = {key: (info.shape, info.dtype) for key, info in merger.tensors.items()}
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    write_sharded(partial, tensors, merger.read, max_shard_bytes=parse_size(max_shard_size))
    merger.check_ledger()
    copy_sidecar(base_dir, partial)
    leave_quantization_out(partial / "config.json")
    partial.rename(target)
    return {"keys_written": len(tensors), "merged": sorted(merger.merged)}


class _Merger:
    """Reads the base's tensors with what the adapters add to them, and keeps count."""

    def __init__(self, base_dir: Path, source: AdapterSource) -> None:
        config = read_config(base_dir)
        check_against_architecture(base_dir)
        family = family_of(config)
        self.tensors = SafetensorsFolder(base_dir)
        self.merged: set[str] = set()  # base tensors that changed
        self._source = source
        self._memory_key = family.memory_key
        self._matrices: dict[str, Adapter] = {}  # by HF key in memory
        self._experts: dict[tuple[str, int | None], Adapter] = {}  # by Megatron key and layer
        for adapter in source.plan.adapters:
            if adapter.num_experts is None:
                self._matrices[adapter.hf_key] = adapter
            else:
                linear = adapter.mcore_key.partition(".adapter.")[0]
                self._experts[f"{linear}.weight", adapter.layer] = adapter
        self._regions: dict[str, list[Region]] = defaultdict(list)  # by HF key in the base
        for region in build_plan(family, config, self.tensors.shapes).regions:
            for part in region.sources:
                self._regions[part.key].append(region)
        self._rows: Counter[tuple[str, int | None]] = Counter()  # added so far, of each matrix

    def read(self, key: str) -> Tensor:
        """A tensor of the merged model."""
        tensor = self.tensors.read(key)
        for index, delta in self._updates(key):
            if key not in self.merged:
                self.merged.add(key)
                tensor = tensor.clone()  # the stored one is a read-only map
            part = tensor if index is None else tensor[index]
            part.copy_(delta.add_(part))
        return tensor

    def _updates(self, key: str) -> Iterator[tuple[int | None, Tensor]]:
        """What is added to a base tensor, in fp32, with its index in a stack of experts."""
        if adapter := self._matrices.get(self._memory_key(key)):
            yield None, self._delta(adapter, None, slice(0, adapter.out_features))
        for region in self._regions[key]:
            if adapter := self._experts.get((region.mcore_key, region.offset[0])):
                _, expert, first, _ = region.offset
                delta = self._delta(adapter, expert, slice(first, first + region.shape[2]))
                (piece,) = region.unpack(delta.view(region.shape))
                yield region.sources[0].index, piece

    def _delta(self, adapter: Adapter, expert: int | None, rows: slice) -> Tensor:
        self._rows[adapter.hf_key, expert] += rows.stop - rows.start
        return self._source.delta(adapter, expert, rows=rows)

    def check_ledger(self) -> None:
        """Fails unless every matrix of the adapter has been added exactly once.

        Raises:
            WeightError: Lists the others.
        """
        faults = [
            f"{adapter.hf_key}{'' if expert is None else f' expert {expert}'}: "
            f"{self._rows[adapter.hf_key, expert]} of {adapter.out_features} rows were added"
            for adapter in self._source.plan.adapters
            for expert in adapter.experts
            if self._rows[adapter.hf_key, expert] != adapter.out_features
        ]
        if faults:
            raise WeightError(
                f"{len(faults)} adapter matrice(s) found no place in the base:\n  "
                + "\n  ".join(faults)
            )
