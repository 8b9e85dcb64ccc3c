"""Megatron-Core's torch_dist checkpoints read as global tensors, without a model and without torch.

Whatever parallel layout wrote them, at whatever order of dimensions a chunk is stored; nothing
that a file names is run. `layout` writes what is read here.
"""

from __future__ import annotations

import math
import mmap
import pickle
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmcore.errors import WeightError
from vlmcore.weights.archives import open_archive
from vlmcore.weights.boxes import overlap, swap, window
from vlmcore.weights.dtypes import Raw, itemsize, raw_type
from vlmcore.weights.files import FileReader

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """A stored part of a global tensor."""

    offset: Shape
    shape: Shape
    file: Path
    start: int
    length: int


@dataclass(frozen=True)
class GlobalTensor:
    """A global tensor of a checkpoint, in whatever chunks it is stored."""

    key: str
    shape: Shape
    dtype: str
    chunks: tuple[Chunk, ...]

    def within(self, offset: Shape, shape: Shape) -> GlobalTensor:
        """The same with only the chunks that a box overlaps.

        Raises:
            WeightError: They do not cover the box exactly once.
        """
        found = [(c, overlap(offset, shape, c.offset, c.shape)) for c in self.chunks]
        chunks = tuple(chunk for chunk, common in found if common)
        covered = sum(
            math.prod(high - low for low, high in zip(*common, strict=True))
            for _, common in found
            if common
        )
        if covered != math.prod(shape):
            raise WeightError(
                f"{self.key}: {covered} of {math.prod(shape)} elements are stored at {offset}"
            )
        return GlobalTensor(self.key, self.shape, self.dtype, chunks)


def read_checkpoint(folder: Path) -> dict[str, GlobalTensor]:
    """The global tensors of a torch_dist checkpoint by key; other objects are left out.

    Raises:
        WeightError: The folder is no torch_dist checkpoint, or a data file is missing or short.
    """
    path = folder / ".metadata"
    try:
        with path.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        entries, storage = metadata.state_dict_metadata, metadata.storage_data
        places = {
            (index.fqn, tuple(index.offset)): info
            for index, info in storage.items()
            if getattr(index, "offset", None) is not None
        }
        tensors = {
            key: GlobalTensor(
                key,
                tuple(entry.size),
                entry.properties.state[0],
                tuple(_chunk(folder, key, chunk, places) for chunk in entry.chunks),
            )
            for key, entry in entries.items()
            if hasattr(entry, "size")
        }
    except FileNotFoundError:
        raise WeightError(f"{path} is missing: {folder} is no torch_dist checkpoint") from None
    except WeightError:
        raise
    except Exception as error:  # damaged pickles raise anything
        raise WeightError(f"{path}: unreadable ({error!r}); copy or train it again") from error
    _check_files(folder, storage.values())
    return tensors


def _chunk(folder: Path, key: str, chunk: Any, places: Mapping[Any, Any]) -> Chunk:
    offset = tuple(chunk.offsets)
    info = places.get((key, offset))
    if info is None:
        raise WeightError(f"{folder}: {key} at {offset} has no stored data")
    file = folder / info.relative_path
    return Chunk(offset, tuple(chunk.sizes), file, info.offset, info.length)


def _check_files(folder: Path, infos: Iterable[Any]) -> None:
    needed: dict[str, int] = defaultdict(int)
    for info in infos:
        end = info.offset + info.length
        needed[info.relative_path] = max(needed[info.relative_path], end)
    found = {path.name: path.stat().st_size for path in folder.iterdir()}
    faults = [
        f"{name}: {f'truncated, {found[name]} of {size} bytes' if name in found else 'missing'}"
        for name, size in sorted(needed.items())
        if found.get(name, -1) < size
    ]
    if faults:
        raise WeightError(
            f"{folder}: {len(faults)} data file(s) missing or damaged; copy or train them again:"
            "\n  " + "\n  ".join(faults)
        )


class BoxReader:
    """Reads boxes of global tensors; keeps their files open."""

    def __init__(self) -> None:
        self._files = FileReader()
        self._maps: dict[Path, mmap.mmap] = {}
        self._arrays: dict[tuple[Path, int], Raw] = {}

    def read(
        self, tensor: GlobalTensor, offset: Shape, shape: Shape, *, swapped: bool = False
    ) -> Raw:
        """One box, put together where several chunks hold it.

        Args:
            tensor: Has the chunks that hold the box.
            offset: Where the box begins.
            shape: Its shape.
            swapped: `offset`, `shape` and what is given have the last two dimensions the other way
                round.

        Raises:
            WeightError: A chunk is unreadable or not what the metadata says.
        """
        box: Raw | None = None
        for chunk in tensor.chunks:
            array, begin = self._array(tensor, chunk), chunk.offset
            if swapped:
                array, begin = array.swapaxes(-1, -2), swap(begin)
            common = overlap(offset, shape, begin, array.shape)
            if common is None:
                continue
            piece = self._read(chunk.file, array[window(*common, begin)], tensor.dtype)
            if piece.shape == shape:
                return piece
            if box is None:
                box = np.empty(shape, raw_type(tensor.dtype))
            box[window(*common, offset)] = piece
        assert box is not None, f"{tensor.key}: no chunk at {offset}"  # `within` has checked
        return box

    def is_swapped(self, tensor: GlobalTensor, offset: Shape, shape: Shape) -> bool:
        """Whether a box is one chunk, stored with its last two dimensions the other way round."""
        if len(tensor.chunks) != 1:
            return False
        chunk = tensor.chunks[0]
        stored = self._array(tensor, chunk).swapaxes(-1, -2)
        return (chunk.offset, chunk.shape) == (offset, shape) and stored.flags.c_contiguous

    def _read(self, file: Path, mapped: Raw, dtype: str) -> Raw:
        """What a part of a mapped file holds: read, unless its rows lie apart."""
        if not mapped.flags.c_contiguous:
            return mapped
        begin = np.frombuffer(self._maps[file], np.uint8, 1)
        start = mapped.__array_interface__["data"][0] - begin.__array_interface__["data"][0]
        return self._files.read(file, start, mapped.size, dtype).reshape(mapped.shape)

    def close(self) -> None:
        """Closes the files."""
        self._files.close()

    def _array(self, tensor: GlobalTensor, chunk: Chunk) -> Raw:
        place = (chunk.file, chunk.start)
        if place not in self._arrays:
            self._arrays[place] = self._open(tensor, chunk)
        return self._arrays[place]

    def _open(self, tensor: GlobalTensor, chunk: Chunk) -> Raw:
        if chunk.file not in self._maps:
            with chunk.file.open("rb") as stream:
                self._maps[chunk.file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        mapped = self._maps[chunk.file]
        try:
            found = open_archive(mapped, chunk.start, chunk.length)
        except ValueError as error:
            raise WeightError(f"{chunk.file}: {tensor.key} is unreadable ({error})") from error
        if (found.dtype, found.shape) != (tensor.dtype, chunk.shape):
            raise WeightError(
                f"{chunk.file}: {tensor.key} at {chunk.offset} is {found.dtype} {found.shape}, "
                f".metadata says {tensor.dtype} {chunk.shape}"
            )
        size = itemsize(found.dtype)
        strides = tuple(n * size for n in found.stride)
        return np.ndarray(found.shape, raw_type(found.dtype), mapped, found.start, strides)


class _Record:
    """Stands in for any class that `.metadata` names; holds what was saved of it."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        self.state = state


class _MetadataUnpickler(pickle.Unpickler):
    """Reads `.metadata` into records: no class of it is imported, no function called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and name.islower():
            return name  # a dtype
        return _Record
