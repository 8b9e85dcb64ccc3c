"""HF safetensors folders: what they hold, reading by element range, and writing.

Headers are read here rather than by the safetensors library, so that the converter knows where each
tensor's bytes stand and its workers need no torch.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmcore.errors import WeightError
from vlmcore.weights.dtypes import NAMES, Raw, cast, dequantize, itemsize
from vlmcore.weights.files import FileReader
from vlmcore.weights.quantized import Scale, present
from vlmcore.weights.shards import plan_shards, shard_index

if TYPE_CHECKING:
    import torch
    from torch import Tensor

INDEX = "model.safetensors.index.json"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
_MAX_HEADER = 100_000_000  # bytes; the format's own limit

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint and where its bytes stand.

    Attributes:
        shape: Its shape.
        stored: Element type in the file, by its torch name.
        file: The file that holds it.
        start: Its first byte there.
        scale: What dequantizes it; None where it is stored as it is.
    """

    shape: Shape
    stored: str
    file: Path
    start: int
    scale: Scale | None = None

    @property
    def dtype_name(self) -> str:
        """Element type that readers get."""
        return self.scale.dtype if self.scale else self.stored

    @property
    def dtype(self) -> torch.dtype:
        """Element type that readers get, as torch's."""
        return _torch_dtype(self.dtype_name)

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor as readers get it."""
        return math.prod(self.shape) * itemsize(self.dtype_name)


class SafetensorsFolder(Mapping[str, TensorInfo]):
    """The tensors of an HF model folder by key; `read` loads one (memory-mapped).

    Raises:
        WeightError: Lists what is wrong: no shard, an unreadable index, one that names a missing
            file or key, a truncated shard, a key that stands in two shards, an unknown element
            type, a quantization that is not float8 in blocks.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = TensorReader()
        placed = _read_index(folder / INDEX)
        self.files = (
            sorted(folder.glob("*.safetensors"))
            if placed is None
            else sorted({folder / name for name in placed.values()})
        )
        faults: list[str] = []
        if not self.files:
            faults.append("no *.safetensors; expected an HF model folder")
        infos: dict[str, TensorInfo] = {}
        for file in self.files:
            for key, info in _read_header(file, faults).items():
                if key in infos:
                    faults.append(f"{key}: stands in {infos[key].file.name} and {file.name}")
                infos[key] = info
        if not faults and (lost := sorted(set(placed or ()) - set(infos))):
            faults.append(f"{INDEX}: names tensors that no shard holds: {', '.join(lost)}")
        self._infos = present(infos, _config(folder), faults)
        if faults:
            raise WeightError(f"{folder}: {len(faults)} fault(s):\n  " + "\n  ".join(faults))

    def __getitem__(self, key: str) -> TensorInfo:
        return self._infos[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Key → shape of every tensor."""
        return {key: info.shape for key, info in self._infos.items()}

    def read(self, key: str) -> Tensor:
        """One tensor: mapped from its file, or dequantized."""
        from safetensors import safe_open

        info = self._infos[key]
        if info.scale is None:
            with safe_open(info.file, "pt") as handle:
                tensor: Tensor = handle.get_tensor(key)
                return tensor
        import torch

        raw = self._reader.elements(info, 0, math.prod(info.shape))
        return torch.from_numpy(raw).view(info.dtype).reshape(info.shape)


class TensorReader:
    """Reads ranges of the elements of tensors; keeps their files open."""

    def __init__(self) -> None:
        self._files = FileReader()

    def elements(self, info: TensorInfo, first: int, last: int) -> Raw:
        """Elements `first` to `last` of a tensor, counted flat, dequantized where it needs that."""
        if info.scale is None:
            start = info.start + first * itemsize(info.stored)
            return self._files.read(info.file, start, last - first, info.stored)
        columns = info.shape[-1]
        rows = range(first // columns, -(-last // columns))
        start = info.start + rows.start * columns
        codes = self._files.read(info.file, start, len(rows) * columns, info.stored)
        scales = self._scales(info, np.arange(rows.start, rows.stop))
        numbers = dequantize(codes.reshape(len(rows), columns), scales, info.scale.dtype)
        begin = first - rows.start * columns
        return numbers.reshape(-1)[begin : begin + last - first]

    def close(self) -> None:
        """Closes the files."""
        self._files.close()

    def _scales(self, info: TensorInfo, rows: Raw) -> Raw:
        """The scale of every element of some rows, as float32; rows count through the stack."""
        assert info.scale is not None
        found, block = info.scale.info, info.scale.block
        stored = self._files.read(found.file, found.start, math.prod(found.shape), found.stored)
        scales = cast(stored, found.stored, "float32").view(np.float32)
        height, columns = info.shape[-2:]
        by_row = scales.reshape(-1, *found.shape[-2:])[rows // height, rows % height // block[0]]
        return np.repeat(by_row, block[1], axis=1)[:, :columns]


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise WeightError(f"{path}: not JSON ({error})") from None
    return config


def _read_index(path: Path) -> dict[str, str] | None:
    """Key → file name; None where the folder has no index."""
    if not path.is_file():
        return None
    try:
        placed: dict[str, str] = json.loads(path.read_text())["weight_map"]
        names = set(placed.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightError(
            f"{path}: no index of safetensors ({error!r}); download it again"
        ) from None
    if strange := sorted(str(name) for name in names if Path(str(name)).name != name):
        raise WeightError(f"{path}: file names with a folder in them: {', '.join(strange)}")
    return placed


def _read_header(file: Path, faults: list[str]) -> dict[str, TensorInfo]:
    """What one file holds (safetensors format 1); what is wrong goes to `faults`."""
    if not file.is_file():
        faults.append(f"{file}: named by the index but missing; download it again")
        return {}
    try:
        with file.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            if length > _MAX_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header: dict[str, dict[str, Any]] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        size = file.stat().st_size - 8 - length
        spans = {key: _span(key, entry, size) for key, entry in header.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        faults.append(f"{file}: unreadable ({error}); download it again")
        return {}
    faults += [
        f"{key}: dtype {entry['dtype']}, expected one of {', '.join(sorted(NAMES))}"
        for key, entry in header.items()
        if entry["dtype"] not in NAMES
    ]
    return {
        key: TensorInfo(tuple(entry["shape"]), NAMES[entry["dtype"]], file, 8 + length + spans[key])
        for key, entry in header.items()
        if entry["dtype"] in NAMES
    }


def _span(key: str, entry: Mapping[str, Any], size: int) -> int:
    """Where a tensor begins in the data of its file.

    Raises:
        ValueError: It does not have the bytes that its shape needs, or they are not in the file.
    """
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end <= size:
        raise ValueError(f"{key} ends at byte {end} of {size}")
    if entry["dtype"] in NAMES:
        needed = math.prod(entry["shape"]) * itemsize(NAMES[entry["dtype"]])
        if end - begin != needed:
            raise ValueError(f"{key} has {end - begin} bytes, its shape needs {needed}")
    return int(begin)


def parse_size(text: str) -> int:
    """Bytes of a size such as `4GB` (decimal units, as in transformers)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)", text.strip())
    if not found:
        raise ValueError(f"size {text!r}: expected a number and KB, MB or GB, such as 4GB")
    return int(float(found[1]) * _UNITS[found[2]])


def write_sharded(
    folder: Path,
    tensors: Mapping[str, tuple[Shape, torch.dtype]],
    read: Callable[[str], Tensor],
    *,
    max_shard_bytes: int,
) -> list[Path]:
    """Writes safetensors shards, and the index where there are several; one tensor in memory.

    Args:
        folder: Existing target folder.
        tensors: Key → (shape, dtype), in the order of writing.
        read: Gives the tensor of a key; called once per key.
        max_shard_bytes: A shard's data at most; a larger tensor gets a shard of its own.

    Returns:
        The shard files.

    Raises:
        WeightError: A tensor differs from what was said of it.
    """
    named = {key: (shape, str(dtype).removeprefix("torch.")) for key, (shape, dtype)
             in tensors.items()}  # fmt: skip
    shards = plan_shards(named, max_shard_bytes=max_shard_bytes)
    for shard in shards:
        with (folder / shard.name).open("wb") as file:
            file.write(shard.header)
            for key in shard.starts:
                tensor, (shape, dtype) = read(key), tensors[key]
                if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
                    raise WeightError(
                        f"{key}: got {tuple(tensor.shape)} {tensor.dtype}, expected {shape} {dtype}"
                    )
                file.write(tensor_bytes(tensor))
    if (index := shard_index(shards)) is not None:
        (folder / INDEX).write_text(index)
    return [folder / shard.name for shard in shards]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw little-endian bytes of a tensor, without a copy where it is contiguous."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data
