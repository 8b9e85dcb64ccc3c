import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vlmcore.errors import WeightError
from vlmcore.weights.dtypes import cast
from vlmcore.weights.safetensors_io import (
    SafetensorsFolder,
    TensorReader,
    parse_size,
    tensor_bytes,
    write_sharded,
)

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


def test_an_index_that_is_no_index_is_refused(tmp_path: Path) -> None:
    write(tmp_path, max_shard_bytes=50)
    for text in ("{", "[]", '{"weight_map": ["a"]}'):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(WeightError, match="no index of safetensors"):
            SafetensorsFolder(tmp_path)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(WeightError, match=r"file names with a folder in them: \.\./a"):
        SafetensorsFolder(tmp_path)


def test_every_damaged_file_is_in_one_message(tmp_path: Path) -> None:
    first, second, *_ = write(tmp_path, max_shard_bytes=50)
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(WeightError, match=rf"(?s){first.name}: named.*{second.name}: unreadable"):
        SafetensorsFolder(tmp_path)


def test_a_dtype_that_we_do_not_handle_is_named(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4).to(torch.float8_e5m2)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightError, match="w: dtype F8_E5M2, expected one of BF16"):
        SafetensorsFolder(tmp_path)


BLOCK = 4
QUANTIZED = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}


def write_float8(folder: Path, tensors: dict, **config: object) -> None:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def dequantized(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What torch makes of it: each code times the scale of its block, then rounded once."""
    rows, columns = codes.shape[-2:]
    spread = scale.float().repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)
    return (codes.float() * spread[..., :rows, :columns]).to(torch.bfloat16)


@pytest.mark.parametrize("stack", [(), (3,)], ids=["matrix", "experts"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_float8_blocks_are_read_as_what_they_stand_for(
    tmp_path: Path, stack: tuple[int, ...], scale_dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn((*stack, 10, 6), generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand((*stack, 3, 2), generator=generator).to(scale_dtype)
    tensors = {"w": codes, "w_scale_inv": scale, "norm": torch.ones(3)}
    write_float8(tmp_path, tensors, quantization_config=QUANTIZED)
    folder = SafetensorsFolder(tmp_path)
    assert folder.shapes == {"w": (*stack, 10, 6), "norm": (3,)}
    assert folder["w"].dtype == torch.bfloat16
    assert torch.equal(folder.read("w"), dequantized(codes, scale))


def test_any_range_of_float8_is_read_alike(tmp_path: Path) -> None:
    codes = torch.arange(2 * 10 * 6).reshape(2, 10, 6).remainder(100).to(torch.float8_e4m3fn)
    scale = 1 + torch.arange(2 * 3 * 2).reshape(2, 3, 2).float()
    tensors = {"w": codes, "w_scale_inv": scale}
    write_float8(tmp_path, tensors, quantization_config=QUANTIZED, dtype="float32")
    whole = (codes.float() * dequantized(torch.ones_like(codes), scale).float()).flatten()
    info = SafetensorsFolder(tmp_path)["w"]
    for first, last in ((0, 120), (7, 8), (55, 70), (119, 120)):
        found = TensorReader().elements(info, first, last).view("float32")
        assert found.tolist() == whole[first:last].tolist()


@pytest.mark.parametrize(
    ("tensors", "quantization", "fault"),
    [
        (("w",), QUANTIZED, "w: float8 without w_scale_inv"),
        (("w", "w_scale_inv"), {"quant_method": "fp8"}, r"weight_block_size is \[\]"),
        (("w", "w_scale_inv"), QUANTIZED | {"weight_block_size": [8, 8]}, r"\(3, 2\), expected"),
        ((), {"quant_method": "gptq"}, "quant_method 'gptq', expected fp8 or none"),
    ],
)
def test_a_quantization_that_cannot_be_undone_is_named(
    tmp_path: Path, tensors: tuple[str, ...], quantization: dict, fault: str
) -> None:
    whole = {"w": torch.ones(10, 6).to(torch.float8_e4m3fn), "w_scale_inv": torch.ones(3, 2)}
    stored = {key: whole[key] for key in tensors} | {"norm": torch.ones(3)}
    write_float8(tmp_path, stored, quantization_config=quantization)
    with pytest.raises(WeightError, match=fault):
        SafetensorsFolder(tmp_path)


FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
AWKWARD = [0.0, -0.0, float("inf"), float("-inf"), 65520.0, 1e-8, 1e-40, 3.4e38, 1.00390625]


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_casts_give_the_bits_that_torch_gives(source: torch.dtype, target: torch.dtype) -> None:
    spread = torch.randn(4000) * 10.0 ** torch.randint(-30, 30, (4000,))
    numbers = torch.cat([spread, torch.tensor(AWKWARD)]).to(source)
    names = [str(dtype).removeprefix("torch.") for dtype in (source, target)]
    found = cast(bits(numbers), *names)
    assert found.tolist() == bits(numbers.to(target)).tolist()


def bits(tensor: torch.Tensor) -> np.ndarray:
    size = tensor.dtype.itemsize
    return np.frombuffer(tensor_bytes(tensor), f"u{size}")


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
