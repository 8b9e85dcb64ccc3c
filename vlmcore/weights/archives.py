"""The archives that `torch.save` makes of one tensor, as head + data + tail, without torch.

A `.distcp` file of torch_dist is a row of such archives. Knowing head and tail beforehand lets
several workers stream data into one file, and reading only the directory of an archive lets a
tensor be mapped where it stands. The format is a zip (stored, not compressed) with the records
data.pkl, byteorder, version and data/0 (torch 2.13, `torch/serialization.py`); torch's reader
checks no CRC of data/0, as with `torch.serialization.set_crc32_options(False)`.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vlmcore.weights import pickles
from vlmcore.weights.dtypes import itemsize

Shape = tuple[int, ...]

ALIGNMENT = 64  # of the data, as in torch's own archives
_STORAGES = {"float64": "DoubleStorage", "float32": "FloatStorage", "float16": "HalfStorage",
             "bfloat16": "BFloat16Storage"}  # fmt: skip
_DTYPES = {storage: dtype for dtype, storage in _STORAGES.items()}
_IN_ZIP64 = 0xFFFFFFFF  # the 32-bit field's value that says: look at the 64-bit one
_PADDING = 0x4246  # id of the extra field with which torch aligns its data


@dataclass(frozen=True)
class StoredArray:
    """An archive's tensor: what it is, and where in the archive its first byte stands."""

    dtype: str
    shape: Shape
    stride: Shape
    start: int


def archive_ends(dtype: str, shape: Shape, stride: Shape) -> tuple[bytes, bytes]:
    """What stands before and after a tensor's data; the head is aligned.

    Args:
        dtype: Torch name.
        shape: Of the tensor.
        stride: In elements; the data has no gaps.
    """
    size = math.prod(shape) * itemsize(dtype)
    head, directory = _records(_tensor(dtype, shape, stride))
    name, sizes = "data/0", struct.pack("<HHQQ", 1, 16, size, size)
    directory += _central(name, b"", len(head), sizes=sizes)
    bare = len(head) + len(_local(name, 0, 0, 0, sizes)) + 4
    padding = -bare % ALIGNMENT
    extra = sizes + struct.pack("<HH", _PADDING, padding) + bytes(padding)
    head += _local(name, 0, _IN_ZIP64, _IN_ZIP64, extra)
    begin = len(head) + size
    return head, directory + _end(4, begin, len(directory))


def archive_of(item: bytes) -> bytes:
    """The archive of an object without tensors.

    Args:
        item: As `pickles` writes it.
    """
    head, directory = _records(item)
    return head + directory + _end(3, len(head), len(directory))


def contiguous(shape: Shape) -> Shape:
    """Strides of a tensor in its own order of dimensions, in elements."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _records(item: bytes) -> tuple[bytes, bytes]:
    """The records that say what an archive holds, and their part of its directory."""
    records = {"data.pkl": pickles.whole(item), "byteorder": b"little", "version": b"3\n"}
    head, directory = b"", b""
    for name, data in records.items():
        directory += _central(name, data, len(head))
        head += _local(name, zlib.crc32(data), len(data), len(data), b"") + data
    return head, directory


def _local(name: str, crc: int, packed: int, size: int, extra: bytes) -> bytes:
    named = f"archive/{name}".encode()
    fields = (45, 0, 0, 0, 0, crc, packed, size, len(named), len(extra))
    return struct.pack("<4sHHHHHIIIHH", b"PK\3\4", *fields) + named + extra


def _central(name: str, data: bytes, offset: int, *, sizes: bytes = b"") -> bytes:
    named = f"archive/{name}".encode()
    size = _IN_ZIP64 if sizes else len(data)
    fields = (45, 45, 0, 0, 0, 0, zlib.crc32(data), size, size, len(named), len(sizes), 0, 0, 0, 0)
    return struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\1\2", *fields, offset) + named + sizes


def _end(count: int, begin: int, size: int) -> bytes:
    """The end of the directory in its 64-bit form, as tensors past 4 GB need."""
    long = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, begin)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, begin + size, 1)
    short = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, _IN_ZIP64, _IN_ZIP64, 0)
    return long + locator + short


def _tensor(dtype: str, shape: Shape, stride: Shape) -> bytes:
    """`_rebuild_tensor_v2(storage, 0, shape, stride, False, OrderedDict())`."""
    storage = pickles.sequence(
        pickles.text("storage"), pickles.named("torch", _STORAGES[dtype]), pickles.text("0"),
        pickles.text("cpu"), pickles.number(math.prod(shape)),
    )  # fmt: skip
    return pickles.call(
        pickles.named("torch._utils", "_rebuild_tensor_v2"),
        storage + b"Q",  # looked up by the loader
        pickles.number(0), pickles.numbers(shape), pickles.numbers(stride), pickles.FALSE,
        pickles.call(pickles.named("collections", "OrderedDict")),
    )  # fmt: skip


def open_archive(mapped: mmap.mmap, start: int, length: int) -> StoredArray:
    """The tensor in the archive of `length` bytes at byte `start` of a mapped file.

    Raises:
        ValueError: It is no archive of one tensor of a floating-point type.
    """
    try:
        with zipfile.ZipFile(_Window(mapped, start, length)) as archive:
            names = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            found = _Unpickler(io.BytesIO(archive.read(names["data.pkl"]))).load()
        record = names["data/0"]
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, KeyError) as error:
        raise ValueError(f"no archive of a tensor ({error!r})") from error
    if not isinstance(found, _Rebuilt):
        raise ValueError(f"an archive of {type(found).__name__}, expected a tensor")
    size = itemsize(found.dtype)
    local = start + record.header_offset
    named, extra = struct.unpack("<HH", mapped[local + 26 : local + 30])
    begin = record.header_offset + 30 + named + extra
    used = 1 + sum((n - 1) * s for n, s in zip(found.shape, found.stride, strict=True))
    if math.prod(found.shape) and (found.offset + used) * size > record.file_size:
        raise ValueError(f"{record.file_size} bytes of data for {found.dtype} {found.shape}")
    return StoredArray(found.dtype, found.shape, found.stride, start + begin + found.offset * size)


class _Window(io.RawIOBase):
    """A range of a mapped file as a file of its own."""

    def __init__(self, mapped: mmap.mmap, start: int, length: int) -> None:
        self._mapped, self._start, self._length, self._position = mapped, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._length - self._position)
        count = left if size is None or size < 0 else min(size, left)
        begin = self._start + self._position
        self._position += count
        return self._mapped[begin : begin + count]


@dataclass(frozen=True)
class _Rebuilt:
    dtype: str
    offset: int
    shape: Shape
    stride: Shape


def _rebuild(storage: str, offset: int, shape: Shape, stride: Shape, *_: object) -> _Rebuilt:
    return _Rebuilt(storage, offset, tuple(shape), tuple(stride))


class _Unpickler(pickle.Unpickler):
    """Reads the description of a tensor; runs nothing that an archive names."""

    def find_class(self, module: str, name: str) -> Callable[..., Any] | str:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise pickle.UnpicklingError(f"it holds a {module}.{name}")

    def persistent_load(self, saved: tuple[Any, ...]) -> str:
        return str(saved[1])
