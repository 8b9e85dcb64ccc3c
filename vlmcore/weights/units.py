"""Moving one unit of a weight plan between files, with a digest of every tensor on both sides.

Copies are streamed in windows; what a transform rearranges is held once, so a worker's memory is
bounded by the largest matrix that is. A transposed matrix is a copy too: its archive says that its
dimensions are stored the other way round. numpy only, see `dtypes`.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlmcore.weights.boxes import swap
from vlmcore.weights.dtypes import Raw, cast, itemsize
from vlmcore.weights.files import FileReader
from vlmcore.weights.journal import Done
from vlmcore.weights.layout import Box, Place
from vlmcore.weights.plan import Region, Source, Unit
from vlmcore.weights.safetensors_io import TensorInfo, TensorReader
from vlmcore.weights.torch_dist import BoxReader, GlobalTensor

WINDOW_BYTES = 1 << 18  # of a streamed copy: small enough to stay in a core's cache
STRIP = 32  # columns that are rearranged at once: numpy alone runs through memory

Shape = tuple[int, ...]


@dataclass(frozen=True)
class PackUnit:
    """HF tensors → Megatron boxes.

    Attributes:
        number: Of the unit in the plan.
        unit: What to move.
        tensors: The HF tensors of the unit.
        boxes: The box of each region, with its dtype.
        places: Where each box's archive goes.
    """

    number: int
    unit: Unit
    tensors: Mapping[str, TensorInfo]
    boxes: tuple[Box, ...]
    places: tuple[Place, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes that are written."""
        return sum(math.prod(box.shape) * itemsize(box.dtype) for box in self.boxes)

    @property
    def file(self) -> Path:
        """The file that its first byte goes to."""
        return Path(self.places[0].file)


@dataclass(frozen=True)
class UnpackUnit:
    """Megatron boxes → HF tensors.

    Attributes:
        number: Of the unit in the plan.
        unit: What to move.
        stored: The global tensor of each region, with the chunks that hold the region.
        tensors: The HF tensors of the unit as they will stand in their shards.
    """

    number: int
    unit: Unit
    stored: tuple[GlobalTensor, ...]
    tensors: Mapping[str, TensorInfo]

    @property
    def size_bytes(self) -> int:
        """Bytes that are written."""
        return sum(info.size_bytes for info in self.tensors.values())

    @property
    def file(self) -> Path:
        """The file that its first byte goes to."""
        return next(iter(self.tensors.values())).file


Task = PackUnit | UnpackUnit


class Mover:
    """Moves units; keeps the files it meets open until it is closed.

    Args:
        folder: What files to be written are relative to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors = TensorReader()
        self._files = FileReader()
        self._boxes = BoxReader()
        self._written: dict[Path, int] = {}

    def close(self) -> None:
        """Closes the files."""
        for reader in (self._tensors, self._files, self._boxes):
            reader.close()
        while self._written:
            os.close(self._written.popitem()[1])

    def move(self, task: Task) -> Done:
        """Moves one unit.

        Raises:
            WeightError: A source is truncated or unreadable.
            OSError: The target cannot be written.
        """
        return self._pack(task) if isinstance(task, PackUnit) else self._unpack(task)

    def holds(self, task: Task, done: Done) -> bool:
        """Whether the target holds what a journal says of a unit; reads it back."""
        digests = _Digests()
        if isinstance(task, PackUnit):
            sound = [
                self._read_back(box, place, digests[region.label])
                for region, box, place in _boxes(task)
            ]
            return all(sound) and digests.results == done.boxes
        for key, info in task.tensors.items():
            for part in _windows(range(math.prod(info.shape)), info):
                written = self._tensors.elements(_in(self._folder, info), part.start, part.stop)
                digests[key].update(written)
        return digests.results == done.tensors

    def _read_back(self, box: Box, place: Place, digest: _Digest) -> bool:
        """Digests an archive's data; False if what stands around it is damaged."""
        head, tail = box.archive_ends()
        file, begin, end = self._folder / place.file, len(head), place.length - len(tail)
        ends = (
            self._files.read(file, place.start, begin, "uint8").tobytes(),
            self._files.read(file, place.start + end, len(tail), "uint8").tobytes(),
        )
        step = WINDOW_BYTES // itemsize(box.dtype)
        for first in range(0, count := math.prod(box.shape), step):
            start = place.start + begin + first * itemsize(box.dtype)
            digest.update(self._files.read(file, start, min(step, count - first), box.dtype))
        return ends == (head, tail)

    def _pack(self, task: PackUnit) -> Done:
        read, written = _Digests(), _Digests()
        for region, box, place in _boxes(task):
            head, tail = box.archive_ends()
            packed = self._packed(region, box, task.tensors, read, written)
            position = place.start
            for data in itertools.chain((_bytes(head),), packed, (_bytes(tail),)):
                position += self._write(Path(place.file), position, data)
        return Done(task.number, read.results, written.results, task.size_bytes)

    def _packed(
        self,
        region: Region,
        box: Box,
        tensors: Mapping[str, TensorInfo],
        read: _Digests,
        written: _Digests,
    ) -> Iterator[Raw]:
        """The data of a box as it is stored, piece by piece, digested on both sides."""
        sources = list(zip(region.sources, region.hf_shapes, strict=True))
        if region.is_copy or box.swapped:
            ((source, shape),) = sources
            info = tensors[source.key]
            same = info.dtype_name == box.dtype
            if same:
                written[region.label] = read[source.key]
            for part in _windows(_span(source, shape), info):
                raw = self._tensors.elements(info, part.start, part.stop)
                read[source.key].update(raw)
                data = cast(raw, info.dtype_name, box.dtype)
                if not same:
                    written[region.label].update(data)
                yield data
            return
        pieces = []
        for source, shape in sources:
            span = _span(source, shape)
            raw = self._tensors.elements(tensors[source.key], span.start, span.stop)
            read[source.key].update(raw)
            pieces.append(raw.reshape(shape))
        dtype = tensors[sources[0][0].key].dtype_name
        data = cast(region.pack(*pieces), dtype, box.dtype)
        written[region.label].update(data)
        yield data

    def _unpack(self, task: UnpackUnit) -> Done:
        read, written = _Digests(), _Digests()
        for region, stored in zip(task.unit.regions, task.stored, strict=True):
            for source, first, raw, same in self._unpacked(region, stored, read):
                info = task.tensors[source.key]
                data = cast(raw, stored.dtype, info.stored)
                if same and info.stored == stored.dtype:
                    written[source.key] = read[region.label]
                else:
                    written[source.key].update(data)
                self._write(info.file, info.start + first * itemsize(info.stored), data)
        return Done(task.number, written.results, read.results, task.size_bytes)

    def _unpacked(
        self, region: Region, stored: GlobalTensor, read: _Digests
    ) -> Iterator[tuple[Source, int, Raw, bool]]:
        """Parts of the HF tensors of a region: (source, first element in its tensor, data, whether
        these are the bytes as they were stored)."""
        spans = [_span(*one) for one in zip(region.sources, region.hf_shapes, strict=True)]
        digest = read[region.label]
        offset, shape = region.offset, region.shape
        swapped = region.is_transpose and self._boxes.is_swapped(stored, offset, shape)
        if swapped:
            offset, shape = swap(offset), swap(shape)
        if region.is_copy or swapped:
            position = spans[0].start
            for low, size in _slabs(offset, shape, itemsize(stored.dtype)):
                raw = _contiguous(self._boxes.read(stored, low, size, swapped=swapped))
                digest.update(raw)
                yield region.sources[0], position, raw, True
                position += raw.size
            return
        box = _contiguous(self._boxes.read(stored, offset, shape))
        digest.update(box)
        pieces = region.unpack(box.reshape(shape))
        for source, span, piece in zip(region.sources, spans, pieces, strict=True):
            yield source, span.start, _contiguous(piece), False

    def _write(self, file: Path, position: int, data: Raw) -> int:
        """Gives how many bytes it wrote."""
        if file not in self._written:
            self._written[file] = os.open(self._folder / file, os.O_WRONLY)
        left = data.reshape(-1).view(np.uint8).data
        while left:
            count = os.pwrite(self._written[file], left, position)
            left, position = left[count:], position + count
        return data.nbytes


class _Digest:
    """sha256 of a tensor's bytes in order, and how many elements went in."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._elements = 0

    def update(self, data: Raw) -> None:
        self._sha256.update(data.reshape(-1).data)
        self._elements += data.size

    @property
    def result(self) -> tuple[str, int]:
        return self._sha256.hexdigest(), self._elements


class _Digests(dict[str, _Digest]):
    """Digests by the name of a tensor or box; begun when first asked for. One digest may stand
    under a name on both sides, where the bytes are the same."""

    def __missing__(self, name: str) -> _Digest:
        self[name] = _Digest()
        return self[name]

    @property
    def results(self) -> dict[str, tuple[str, int]]:
        return {name: digest.result for name, digest in self.items()}


def _bytes(data: bytes) -> Raw:
    return np.frombuffer(data, np.uint8)


def _boxes(task: PackUnit) -> Iterator[tuple[Region, Box, Place]]:
    return zip(task.unit.regions, task.boxes, task.places, strict=True)


def _in(folder: Path, info: TensorInfo) -> TensorInfo:
    return TensorInfo(info.shape, info.stored, folder / info.file, info.start)


def _span(source: Source, shape: Shape) -> range:
    """Elements of a source in its HF tensor, counted flat."""
    size = math.prod(shape)
    first = size * (source.index or 0)
    return range(first, first + size)


def _windows(span: range, info: TensorInfo) -> Iterator[range]:
    """A span in windows; whole rows of a tensor that is dequantized by rows."""
    step = WINDOW_BYTES // itemsize(info.dtype_name)
    if info.scale is not None:
        step = max(1, step // info.shape[-1]) * info.shape[-1]
    for first in range(span.start, span.stop, step):
        yield range(first, min(first + step, span.stop))


def _slabs(offset: Shape, shape: Shape, size: int) -> Iterator[tuple[Shape, Shape]]:
    """A box in windows of whole rows along its first dimension longer than 1."""
    axis = next((i for i, n in enumerate(shape) if n > 1), 0)
    if not shape or not math.prod(shape):
        yield offset, shape
        return
    rows = max(1, WINDOW_BYTES // (size * math.prod(shape[axis + 1 :])))
    for first in range(0, shape[axis], rows):
        low, high = list(offset), list(shape)
        low[axis], high[axis] = offset[axis] + first, min(rows, shape[axis] - first)
        yield tuple(low), tuple(high)


def _contiguous(array: Raw) -> Raw:
    """The array in its own order of dimensions."""
    if array.flags.c_contiguous:
        return array
    ordered = np.empty(array.shape, array.dtype)
    for first in range(0, array.shape[-1], STRIP):
        ordered[..., first : first + STRIP] = array[..., first : first + STRIP]
    return ordered
