"""Megatron-Core's torch_dist checkpoints as global tensors: written and read without a model.

The layout is torch.distributed.checkpoint's plus Megatron's `metadata.json` and `common.pt`
(megatron-core 0.16): one global tensor per key, chunks at offsets, and a `_extra_state` object per
linear layer that holds `[None]` where TransformerEngine is absent.
"""

from __future__ import annotations

import io
import json
import logging
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from vlmcore.errors import WeightError

log = logging.getLogger(__name__)

Shape = tuple[int, ...]
_LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1",
            "mlp.linear_fc2")  # fmt: skip


@dataclass(frozen=True)
class Chunk:
    """One box of a global tensor, made by `read` when the writer asks for it."""

    key: str
    global_shape: Shape
    offset: Shape
    shape: Shape
    dtype: torch.dtype
    read: Callable[[], Tensor]


def write_chunks(folder: Path, chunks: Sequence[Chunk], *, num_threads: int = 2) -> None:
    """Writes a torch_dist checkpoint from lazily read chunks.

    Args:
        folder: Target folder; created.
        chunks: Boxes that together tile every global tensor.
        num_threads: Writer threads; each holds one chunk at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    layers = _decoder_layers(chunks)
    objects = [
        f"{prefix}decoder.layers.{linear}._extra_state/shard_{i}_{count}"
        for prefix, count in layers.items()
        for i in range(count)
        for linear in _LINEARS
    ]
    planner = _LazyPlanner(chunks, objects)
    writer = FileSystemWriter(
        folder, single_file_per_rank=False, thread_count=num_threads, per_thread_copy_ahead=0
    )
    # torch warns that no process group exists; one process writes here on purpose
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
    torch.save({}, folder / "common.pt")
    backend = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    (folder / "metadata.json").write_text(json.dumps(backend))


def _decoder_layers(chunks: Sequence[Chunk]) -> dict[str, int]:
    """Prefix of each decoder stack → its number of layers."""
    marker = "decoder.layers.self_attention.linear_qkv.weight"
    return {
        chunk.key.removesuffix(marker): chunk.global_shape[0]
        for chunk in chunks
        if chunk.key.endswith(marker)
    }


class _LazyPlanner(DefaultSavePlanner):
    """A save plan over chunks that do not exist yet; each is made when its turn comes."""

    def __init__(self, chunks: Sequence[Chunk], objects: Sequence[str]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._chunks = {MetadataIndex(c.key, torch.Size(c.offset)): c for c in chunks}
        self._objects = objects

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                index=index,
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size(c.offset), torch.Size(c.shape)),
                    properties=TensorProperties(dtype=c.dtype),
                    size=torch.Size(c.global_shape),
                ),
            )
            for index, c in self._chunks.items()
        ]
        items += [
            WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO) for key in self._objects
        ]
        self.plan = SavePlan(items)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        entries: dict[str, Any] = {key: BytesStorageMetadata() for key in self._objects}
        for item in all_plans[0].items:
            data = item.tensor_data
            if data is None:
                continue
            entry = entries.setdefault(
                item.index.fqn, TensorStorageMetadata(data.properties, data.size, [])
            )
            entry.chunks.append(data.chunk)
        self.metadata = Metadata(state_dict_metadata=entries)
        return all_plans, self.metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        self.plan = new_plan
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            stream = io.BytesIO()
            torch.save([None], stream)
            stream.seek(0)
            return stream
        chunk = self._chunks[write_item.index]
        return chunk.read().reshape(chunk.shape)


class TorchDistReader:
    """Boxes of the global tensors of a torch_dist checkpoint, whatever layout wrote it.

    Raises:
        WeightError: The folder is no torch_dist checkpoint, or names a file that is gone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / ".metadata"
        try:
            with path.open("rb") as file:
                self._metadata: Metadata = pickle.load(file)
        except FileNotFoundError:
            raise WeightError(f"{path} is missing: {folder} is no torch_dist checkpoint") from None
        except (pickle.UnpicklingError, EOFError) as error:
            raise WeightError(f"{path}: unreadable ({error})") from error
        self._storage = self._metadata.storage_data or {}
        lost = sorted(
            {info.relative_path for info in self._storage.values()}
            - {file.name for file in folder.iterdir()}
        )
        if lost:
            raise WeightError(f"{folder}: data files are missing: {', '.join(lost)}")

    def info(self, key: str) -> tuple[Shape, torch.dtype]:
        """Global shape and dtype of a tensor."""
        entry = self._metadata.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise WeightError(f"{self.folder}: no tensor {key}")
        return tuple(entry.size), entry.properties.dtype

    def keys(self, *, below: Sequence[str] = ("",)) -> list[str]:
        """Keys of the tensors under any of the prefixes; other objects are left out."""
        return sorted(
            key
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and key.startswith(tuple(below))
        )

    def read(self, key: str, offset: Shape, shape: Shape) -> Tensor:
        """One box of a global tensor, put together from the chunks that overlap it.

        Raises:
            WeightError: The chunks do not cover the box.
        """
        entry = self._metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        box: Tensor | None = None
        covered = 0
        for chunk in entry.chunks:
            low = [max(a, b) for a, b in zip(offset, chunk.offsets, strict=True)]
            high = [
                min(a + n, b + m)
                for a, n, b, m in zip(offset, shape, chunk.offsets, chunk.sizes, strict=True)
            ]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            stored = self._load(MetadataIndex(key, chunk.offsets))
            piece = stored[_window(low, high, chunk.offsets)]
            if tuple(piece.shape) == tuple(shape):
                return piece
            if box is None:
                box = torch.empty(shape, dtype=entry.properties.dtype)
            box[_window(low, high, offset)] = piece
            covered += piece.numel()
        expected = torch.Size(shape).numel()
        if box is None or covered != expected:
            raise WeightError(f"{key}: {covered} of {expected} elements are stored at {offset}")
        return box

    def _load(self, index: MetadataIndex) -> Tensor:
        info = self._storage.get(index) or next(
            (v for k, v in self._storage.items() if (k.fqn, k.offset) == (index.fqn, index.offset)),
            None,
        )
        if info is None:
            raise WeightError(f"{self.folder}: {index.fqn} at {index.offset} has no stored data")
        path = self.folder / info.relative_path
        with path.open("rb") as file:
            file.seek(info.offset)
            data = io.BytesIO(file.read(info.length))
        try:
            return torch.load(data, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise WeightError(f"{path}: {index.fqn} is unreadable ({error})") from error


def _window(low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))
