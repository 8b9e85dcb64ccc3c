"""HF safetensors folders: lazy reading, and writing shard by shard without holding a shard."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlmcore.errors import WeightError

_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of one stored tensor, and the file that holds it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class SafetensorsFolder(Mapping[str, TensorInfo]):
    """The tensors of an HF model folder by key; `read` loads one (memory-mapped).

    Raises:
        WeightError: No shard, an index that names a missing file or key, a truncated shard, a key
            that stands in two shards, a dtype that only quantized checkpoints have.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handles: dict[Path, safe_open] = {}
        self._infos: dict[str, TensorInfo] = {}
        index = folder / "model.safetensors.index.json"
        placed = json.loads(index.read_text())["weight_map"] if index.is_file() else None
        files = (
            sorted(folder.glob("*.safetensors"))
            if placed is None
            else sorted({folder / name for name in placed.values()})
        )
        if not files:
            raise WeightError(f"{folder}: no *.safetensors; expected an HF model folder")
        for file in files:
            self._open(file)
        if placed is not None and (lost := sorted(set(placed) - set(self._infos))):
            raise WeightError(f"{index}: names tensors that no shard holds: {', '.join(lost)}")

    def _open(self, file: Path) -> None:
        if not file.is_file():
            raise WeightError(f"{file}: named by the index but missing; download it again")
        try:
            handle = safe_open(file, "pt")
        except (SafetensorError, OSError) as error:
            raise WeightError(f"{file}: unreadable ({error}); download it again") from error
        self._handles[file] = handle
        for key in handle.keys():  # noqa: SIM118 - safe_open is no mapping
            if key in self._infos:
                raise WeightError(f"{key}: stands in {self._infos[key].file.name} and {file.name}")
            part = handle.get_slice(key)
            code = part.get_dtype()
            if code not in _DTYPES:
                known = ", ".join(sorted(_DTYPES))
                raise WeightError(
                    f"{file}: {key}: dtype {code}, expected one of {known}; take the unquantized "
                    f"checkpoint"
                )
            self._infos[key] = TensorInfo(tuple(part.get_shape()), _DTYPES[code], file)

    def __getitem__(self, key: str) -> TensorInfo:
        return self._infos[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key → shape of every tensor."""
        return {key: info.shape for key, info in self._infos.items()}

    def read(self, key: str) -> Tensor:
        """One tensor, mapped from its file."""
        return self._handles[self._infos[key].file].get_tensor(key)


def parse_size(text: str) -> int:
    """Bytes of a size such as `4GB` (decimal units, as in transformers)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)", text.strip())
    if not found:
        raise ValueError(f"size {text!r}: expected a number and KB, MB or GB, such as 4GB")
    return int(float(found[1]) * _UNITS[found[2]])


def write_sharded(
    folder: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
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
    """
    shards = list(_group(tensors, max_shard_bytes))
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    total = 0
    for name, keys in zip(names, shards, strict=True):
        total += _write_shard(folder / name, {key: tensors[key] for key in keys}, read)
    if len(shards) > 1:
        placed = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return [folder / name for name in names]


def _group(
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], limit: int
) -> Iterable[list[str]]:
    shard: list[str] = []
    size = 0
    for key, (shape, dtype) in tensors.items():
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        if shard and size + num_bytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(key)
        size += num_bytes
    yield shard


def _write_shard(
    path: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    read: Callable[[str], Tensor],
) -> int:
    """One file: 8 bytes of header length, the JSON header, the data (safetensors format 1)."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for key, (shape, dtype) in tensors.items():
        end = position + torch.Size(shape).numel() * dtype.itemsize
        header[key] = {
            "dtype": _CODES[dtype],
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # data starts aligned, as the format asks
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for key, (shape, dtype) in tensors.items():
            tensor = read(key)
            if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
                raise WeightError(
                    f"{key}: got {tuple(tensor.shape)} {tensor.dtype}, expected {shape} {dtype}"
                )
            file.write(tensor_bytes(tensor))
    return position


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw little-endian bytes of a tensor, without a copy where it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data
