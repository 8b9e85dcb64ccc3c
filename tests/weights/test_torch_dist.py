import io
import math
import mmap
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from tests.weights.checkpoints import load
from vlmcore.errors import WeightError
from vlmcore.weights import layout
from vlmcore.weights.archives import archive_ends, contiguous, open_archive
from vlmcore.weights.layout import Box, place_boxes, write_metadata
from vlmcore.weights.safetensors_io import tensor_bytes
from vlmcore.weights.torch_dist import BoxReader, read_checkpoint

SHAPES = [(), (0,), (7,), (1, 3, 5), (2, 3, 4, 5)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def numbered(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(math.prod(shape)).reshape(shape).to(dtype)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_loads_the_archives_we_write(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = numbered(shape, dtype)
    head, tail = archive_ends(name_of(dtype), shape, contiguous(shape))
    found = torch.load(io.BytesIO(head + bytes(tensor_bytes(tensor)) + tail), weights_only=True)
    assert found.dtype == dtype
    assert torch.equal(found, tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_we_find_the_data_in_archives_that_torch_writes(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = numbered((4, 6), dtype)
    for tensor in (whole, whole.T, whole[1:3]):  # also a view of a larger storage
        stream = io.BytesIO(b"before")
        stream.seek(0, io.SEEK_END)
        torch.save(tensor, stream)
        (tmp_path / "file").write_bytes(stream.getvalue() + b"after")
        with (tmp_path / "file").open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        found = open_archive(mapped, 6, len(stream.getvalue()) - 6)
        assert (found.dtype, found.shape) == (name_of(dtype), tuple(tensor.shape))
        raw = np.ndarray(
            found.shape,
            f"u{dtype.itemsize}",
            mapped,
            found.start,
            tuple(n * dtype.itemsize for n in found.stride),
        )
        assert raw.tobytes() == bytes(tensor_bytes(tensor))


def test_a_tensor_past_four_gigabytes_is_loaded(tmp_path: Path) -> None:
    shape = (1200, 1_000_000)
    head, tail = archive_ends("float32", shape, contiguous(shape))
    with (tmp_path / "file").open("wb") as file:  # sparse: holds no data
        file.write(head)
        file.seek(4 * math.prod(shape), io.SEEK_CUR)
        file.write(tail)
    assert torch.load(tmp_path / "file", mmap=True).shape == shape


def test_an_archive_that_names_other_code_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.Generator}, tmp_path / "file")
    with (tmp_path / "file").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with pytest.raises(ValueError, match="it holds a torch"):
        open_archive(mapped, 0, len(mapped))


WHOLE = numbered((6, 8), torch.float32)


def write_tiles(folder: Path, tiles: list[tuple[int, int, int, int]]) -> None:
    """Tiles of WHOLE: first row and column, rows, columns."""
    boxes = [Box("w", (6, 8), (r, c), (h, w), "float32") for r, c, h, w in tiles]
    folder.mkdir()
    placed = dict(zip(boxes, place_boxes(boxes), strict=True))
    for box, place in placed.items():
        (r, c), (h, w) = box.offset, box.shape
        head, tail = box.archive_ends()
        with (folder / place.file).open("ab") as file:
            file.truncate(place.start)
        with (folder / place.file).open("ab") as file:
            file.write(head + bytes(tensor_bytes(WHOLE[r : r + h, c : c + w])) + tail)
    write_metadata(folder, placed)


TILES = [(r, c, 2, 4) for r in (0, 2, 4) for c in (0, 4)]


def test_torch_reads_the_checkpoints_we_write(tmp_path: Path) -> None:
    write_tiles(tmp_path / "c", TILES)
    assert torch.equal(load(tmp_path / "c")["w"], WHOLE)


def test_the_metadata_is_what_torch_would_pickle(tmp_path: Path) -> None:
    key = "decoder.layers.mlp.linear_fc1.weight"
    boxes = [Box(key, (2, 4, 4), (i, 0, 0), (1, 4, 4), "bfloat16") for i in range(2)]
    placed = dict(zip(boxes, place_boxes(boxes), strict=True))
    write_metadata(tmp_path, placed)
    chunks = [ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape)) for box in boxes]
    properties = TensorProperties(dtype=torch.bfloat16)
    size = len((tmp_path / "__0_objects.distcp").read_bytes())
    extras = [f"decoder.layers.mlp.linear_fc1._extra_state/shard_{i}_2" for i in range(2)]
    expected = Metadata(
        {key: TensorStorageMetadata(properties, torch.Size((2, 4, 4)), chunks)}
        | dict.fromkeys(extras, BytesStorageMetadata()),
        storage_data={
            MetadataIndex(box.key, box.offset): _StorageInfo(*vars(place).values())
            for box, place in placed.items()
        }
        | {MetadataIndex(extra): _StorageInfo("__0_objects.distcp", 0, size) for extra in extras},
    )
    assert pickle.loads((tmp_path / ".metadata").read_bytes()) == expected
    assert torch.load(tmp_path / "__0_objects.distcp", weights_only=True) == [None]
    assert torch.load(tmp_path / "common.pt", weights_only=True) == {}


def test_a_box_stored_the_other_way_round_is_the_same_tensor(tmp_path: Path) -> None:
    box = Box("w", (6, 8), (0, 0), (6, 8), "float32", swapped=True)
    (place,) = place_boxes([box])
    head, tail = box.archive_ends()
    (tmp_path / place.file).write_bytes(head + bytes(tensor_bytes(WHOLE.T)) + tail)
    write_metadata(tmp_path, {box: place})
    assert torch.equal(load(tmp_path)["w"], WHOLE)
    tensor, reader = read_checkpoint(tmp_path)["w"], BoxReader()
    assert reader.is_swapped(tensor, (0, 0), (6, 8))
    assert reader.read(tensor, (2, 3), (4, 5)).tobytes() == bytes(tensor_bytes(WHOLE[2:, 3:]))
    found = reader.read(tensor, (3, 2), (5, 4), swapped=True)
    assert found.tobytes() == bytes(tensor_bytes(WHOLE.T[3:, 2:]))


def test_a_box_is_put_together_from_any_tiling(tmp_path: Path) -> None:
    write_tiles(tmp_path / "c", TILES)
    tensor = read_checkpoint(tmp_path / "c")["w"]
    for offset, shape in (((0, 0), (6, 8)), ((1, 3), (4, 2)), ((5, 7), (1, 1)), ((2, 4), (2, 4))):
        r, c = offset
        expected = WHOLE[r : r + shape[0], c : c + shape[1]]
        found = BoxReader().read(tensor.within(offset, shape), offset, shape)
        assert found.tobytes() == bytes(tensor_bytes(expected))


def test_a_box_without_a_chunk_is_refused(tmp_path: Path) -> None:
    write_tiles(tmp_path / "c", TILES[:2])
    tensor = read_checkpoint(tmp_path / "c")["w"]
    with pytest.raises(WeightError, match="w: 16 of 48 elements are stored"):
        tensor.within((0, 0), (6, 8))


def test_large_checkpoints_are_spread_over_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MAX_FILE_BYTES", 3000)
    boxes = [Box("w", (9, 100), (i, 0), (1, 100), "float32") for i in range(9)]
    places = place_boxes(boxes)
    assert [place.file for place in places] == [f"__0_{i // 2}.distcp" for i in range(9)]
    for one, other in zip(places, places[1:], strict=False):
        assert one.file != other.file or one.start + one.length <= other.start


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """As torch itself writes it."""
    tensors = {"a": torch.arange(1000.0), "b": torch.arange(12.0).reshape(3, 4), "other": [1]}
    writer = dcp.FileSystemWriter(tmp_path / "c", single_file_per_rank=False)
    dcp.save(tensors, storage_writer=writer, no_dist=True)
    return tmp_path / "c"


def test_we_read_the_checkpoints_that_torch_writes(checkpoint: Path) -> None:
    found = read_checkpoint(checkpoint)
    assert {key: tensor.shape for key, tensor in found.items()} == {"a": (1000,), "b": (3, 4)}
    box = BoxReader().read(found["b"], (1, 0), (2, 4))
    assert box.tobytes() == bytes(tensor_bytes(torch.arange(4.0, 12.0)))


def test_a_lost_and_a_truncated_data_file_are_named_together(checkpoint: Path) -> None:
    lost, cut, *_ = sorted(checkpoint.glob("*.distcp"))
    lost.unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(WeightError) as refusal:
        read_checkpoint(checkpoint)
    assert f"{lost.name}: missing" in str(refusal.value)
    assert f"{cut.name}: truncated" in str(refusal.value)


def test_a_damaged_data_file_is_named(checkpoint: Path) -> None:
    for file in checkpoint.glob("*.distcp"):
        file.write_bytes(bytes(file.stat().st_size))
    tensor = read_checkpoint(checkpoint)["a"]
    with pytest.raises(WeightError, match=r"distcp: a is unreadable"):
        BoxReader().read(tensor, (0,), (1000,))


@pytest.mark.parametrize("kept", [0, 100])
def test_damaged_metadata_is_named(checkpoint: Path, kept: int) -> None:
    path = checkpoint / ".metadata"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(WeightError, match=r"\.metadata: unreadable"):
        read_checkpoint(checkpoint)


class Hostile:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("ran"),))


def test_metadata_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(WeightError, match="unreadable"):
        read_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_metadata_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match="is no torch_dist checkpoint"):
        read_checkpoint(tmp_path)
