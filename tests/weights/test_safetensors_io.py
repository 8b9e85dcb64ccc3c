import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vlmcore.errors import WeightError
from vlmcore.weights.safetensors_io import SafetensorsFolder, parse_size, write_sharded

INDEX = "model.safetensors.index.json"
TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.arange(7, dtype=torch.bfloat16),
    "c": torch.arange(10, dtype=torch.int64).reshape(5, 2),
    "d": torch.tensor([True, False, True]),
    "e": torch.tensor(2.5, dtype=torch.float16),
    "f": torch.arange(24, dtype=torch.float32).reshape(4, 6).T,  # not contiguous
}


def write(folder: Path, tensors: dict = TENSORS, *, max_shard_bytes: int = 10**9) -> list[Path]:
    infos = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    return write_sharded(folder, infos, tensors.__getitem__, max_shard_bytes=max_shard_bytes)


def test_safetensors_reads_what_we_wrote(tmp_path: Path) -> None:
    (file,) = write(tmp_path)
    assert file.name == "model.safetensors"
    assert not (tmp_path / INDEX).exists()
    read = load_file(file)
    assert set(read) == set(TENSORS)
    for key, tensor in TENSORS.items():
        assert read[key].dtype == tensor.dtype
        assert torch.equal(read[key], tensor)
    with safe_open(file, "pt") as handle:
        assert handle.metadata() == {"format": "pt"}


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12), limit=st.integers(1, 60))
def test_shards_respect_their_size(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], limit: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    tensors = {f"t{i}": torch.arange(n, dtype=torch.uint8) for i, n in enumerate(lengths)}
    files = write(folder, tensors, max_shard_bytes=limit)
    found: dict[str, str] = {}
    for file in files:
        read = load_file(file)
        assert sum(t.numel() for t in read.values()) <= limit or len(read) == 1
        assert all(torch.equal(read[key], tensors[key]) for key in read)
        found |= dict.fromkeys(read, file.name)
    assert set(found) == set(tensors)
    if len(files) > 1:
        index = json.loads((folder / INDEX).read_text())
        assert index["weight_map"] == found
        assert index["metadata"]["total_size"] == sum(lengths)


def test_shards_are_read_back_through_their_index(tmp_path: Path) -> None:
    assert len(write(tmp_path, max_shard_bytes=50)) > 2
    save_file({"stray": torch.ones(1)}, tmp_path / "adapter.safetensors")  # not in the index
    folder = SafetensorsFolder(tmp_path)
    assert folder.shapes == {key: tuple(tensor.shape) for key, tensor in TENSORS.items()}
    assert all(torch.equal(folder.read(key), tensor) for key, tensor in TENSORS.items())


def test_a_tensor_that_differs_from_its_announcement_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match=r"a: got \(2,\) torch.float32, expected \(3,\)"):
        write_sharded(
            tmp_path,
            {"a": ((3,), torch.float32)},
            lambda key: torch.zeros(2),
            max_shard_bytes=100,
        )


@pytest.mark.parametrize("kept", [0.9, 0.0])
def test_a_truncated_shard_is_named(tmp_path: Path, kept: float) -> None:
    file = write(tmp_path, max_shard_bytes=50)[1]
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(WeightError, match=f"{file.name}: unreadable"):
        SafetensorsFolder(tmp_path)


def test_an_index_that_names_a_missing_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path, max_shard_bytes=50)[1].unlink()
    with pytest.raises(WeightError, match=r"model-00002-of-\d+.safetensors: named by the index"):
        SafetensorsFolder(tmp_path)


def test_an_index_that_names_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    write(tmp_path, max_shard_bytes=50)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["ghost"] = index["weight_map"]["a"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(WeightError, match="names tensors that no shard holds: ghost"):
        SafetensorsFolder(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"a": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(WeightError, match=r"a: stands in one.safetensors and two.safetensors"):
        SafetensorsFolder(tmp_path)


def test_a_dtype_that_we_do_not_handle_is_named(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightError, match="w: dtype F8_E4M3, expected one of BF16"):
        SafetensorsFolder(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match=r"no \*.safetensors"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize(
    ("text", "size"), [("4GB", 4 * 10**9), ("1.5 MB", 1_500_000), (" 10KB", 10_000)]
)
def test_sizes_are_decimal(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["4", "4GiB", "-1GB", ""])
def test_an_unreadable_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a number and KB, MB or GB"):
        parse_size(text)
