"""Moving one unit of a weight plan between files, with a digest of every tensor on both sides.

Copies are streamed in windows from memory maps; what a transform rearranges is held once, so a
worker's memory is bounded by the largest fused tensor. numpy only, see `dtypes`.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlmcore.weights.archives import archive_ends
from vlmcore.weights.dtypes import Raw, cast, itemsize
from vlmcore.weights.files import FileReader
from vlmcore.weights.journal import Done
from vlmcore.weights.plan import Region, Source, Unit
from vlmcore.weights.safetensors_io import TensorInfo, TensorReader
from vlmcore.weights.torch_dist import Box, BoxReader, GlobalTensor, Place

WINDOW_BYTES = 1 << 20  # of a streamed copy: small enough to stay in a core's cache
STRIP = 32  # columns that are rearranged at once; 5 GB/s, numpy's own copy does 1 GB/s

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
        if isinstance(task, PackUnit):
            found = {
                box.label: self._read_back(box, place)
                for box, place in zip(task.boxes, task.places, strict=True)
            }
            return found == {label: digest for label, (digest, _) in done.boxes.items()}
        return all(
            self._digest_of(_in(self._folder, info)) == done.tensors[key][0]
            for key, info in task.tensors.items()
        )

    def _read_back(self, box: Box, place: Place) -> str:
        """Digest of an archive's data; of nothing that could match if the rest is damaged."""
        head, tail = archive_ends(box.dtype, box.shape)
        file, end = self._folder / place.file, place.length - len(tail)

        def read(first: int, last: int) -> Raw:
            return self._files.read(file, place.start + first, last - first, "uint8")

        if read(0, len(head)).tobytes() != head or read(end, place.length).tobytes() != tail:
            return ""
        digest = hashlib.sha256()
        for first in range(len(head), end, WINDOW_BYTES):
            digest.update(read(first, min(first + WINDOW_BYTES, end)).data)
        return digest.hexdigest()

    def _digest_of(self, info: TensorInfo) -> str:
        digest = _Digest()
        for part in _windows(range(math.prod(info.shape)), info):
            digest.update(self._tensors.elements(info, part.start, part.stop))
        return digest.result[0]

    def _pack(self, task: PackUnit) -> Done:
        digests = {key: _Digest() for key in task.tensors}
        boxes: dict[str, tuple[str, int]] = {}
        for region, box, place in zip(task.unit.regions, task.boxes, task.places, strict=True):
            head, tail = archive_ends(box.dtype, box.shape)
            self._write(Path(place.file), place.start, np.frombuffer(head, np.uint8))
            position = place.start + len(head)
            own = _Digest()
            shared = _is_whole_copy(region, task.tensors, box.dtype)
            for data in self._packed(region, task.tensors, digests, box.dtype):
                if not shared:
                    own.update(data)
                self._write(Path(place.file), position, data)
                position += data.nbytes
            self._write(Path(place.file), position, np.frombuffer(tail, np.uint8))
            boxes[box.label] = (digests[region.sources[0].key] if shared else own).result
        tensors = {key: digest.result for key, digest in digests.items()}
        return Done(task.number, tensors, boxes, task.size_bytes)

    def _packed(
        self,
        region: Region,
        tensors: Mapping[str, TensorInfo],
        digests: Mapping[str, _Digest],
        dtype: str,
    ) -> Iterator[Raw]:
        """The data of a box, piece by piece; its sources are digested on the way."""
        infos = [tensors[source.key] for source in region.sources]
        spans = [_span(*one) for one in zip(region.sources, region.hf_shapes, strict=True)]
        if region.is_copy:
            (info,), (span,), (source,) = infos, spans, region.sources
            for part in _windows(span, info):
                raw = self._tensors.elements(info, part.start, part.stop)
                digests[source.key].update(raw)
                yield cast(raw, info.dtype_name, dtype)
            return
        pieces = []
        for info, span, source, shape in zip(
            infos, spans, region.sources, region.hf_shapes, strict=True
        ):
            raw = self._tensors.elements(info, span.start, span.stop)
            digests[source.key].update(raw)
            pieces.append(raw.reshape(shape))
        yield cast(_contiguous(region.pack(*pieces)), infos[0].dtype_name, dtype)

    def _unpack(self, task: UnpackUnit) -> Done:
        digests = {key: _Digest() for key in task.tensors}
        boxes: dict[str, tuple[str, int]] = {}
        for region, stored in zip(task.unit.regions, task.stored, strict=True):
            own = _Digest()
            infos = {source.key: task.tensors[source.key] for source in region.sources}
            target = next(iter(infos.values())).stored
            shared = _is_whole_copy(region, infos, stored.dtype)
            for source, first, raw in self._unpacked(region, stored, own):
                info = infos[source.key]
                data = cast(raw, stored.dtype, target)
                if not shared:
                    digests[source.key].update(data)
                self._write(info.file, info.start + first * itemsize(target), data)
            if shared:
                digests[region.sources[0].key] = own
            boxes[region.label] = own.result
        tensors = {key: digest.result for key, digest in digests.items()}
        return Done(task.number, tensors, boxes, task.size_bytes)

    def _unpacked(
        self, region: Region, stored: GlobalTensor, own: _Digest
    ) -> Iterator[tuple[Source, int, Raw]]:
        """Parts of the HF tensors of a region: (source, first element in its tensor, data)."""
        spans = [_span(*one) for one in zip(region.sources, region.hf_shapes, strict=True)]
        if region.is_copy:
            position = spans[0].start
            for offset, shape in _slabs(region.offset, region.shape, itemsize(stored.dtype)):
                raw = _contiguous(self._boxes.read(stored, offset, shape))
                own.update(raw)
                yield region.sources[0], position, raw
                position += raw.size
            return
        box = _contiguous(self._boxes.read(stored, region.offset, region.shape))
        own.update(box)
        pieces = region.unpack(box.reshape(region.shape))
        for source, span, piece in zip(region.sources, spans, pieces, strict=True):
            yield source, span.start, _contiguous(piece)

    def _write(self, file: Path, position: int, data: Raw) -> None:
        if file not in self._written:
            self._written[file] = os.open(self._folder / file, os.O_WRONLY)
        left = data.reshape(-1).view(np.uint8).data
        while left:
            count = os.pwrite(self._written[file], left, position)
            left, position = left[count:], position + count


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


def _in(folder: Path, info: TensorInfo) -> TensorInfo:
    return TensorInfo(info.shape, info.stored, folder / info.file, info.start)


def _is_whole_copy(region: Region, tensors: Mapping[str, TensorInfo], dtype: str) -> bool:
    """Whether box and HF tensor are the same bytes, so that one digest is both's."""
    source = region.sources[0]
    return region.is_copy and source.index is None and tensors[source.key].dtype_name == dtype


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
