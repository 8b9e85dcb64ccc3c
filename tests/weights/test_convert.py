import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmcore.errors import WeightError
from vlmcore.training.launch import launch
from vlmcore.weights.architecture import check_against_architecture
from vlmcore.weights.convert import CHECKPOINT, SIDECAR, to_hf, to_mcore
from vlmcore.weights.torch_dist import Chunk, TorchDistReader, write_chunks

WEIGHTS = "model.safetensors"


@pytest.fixture
def mcore_dir(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    to_mcore(tiny_model("qwen3_vl"), tmp_path / "mcore")
    return tmp_path / "mcore"


@pytest.fixture
def tied_copy(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[[torch.Tensor], Path]:
    """A tied model that stores a repetition of its embeddings, as some published ones do."""

    def build(add: float) -> Path:
        copy = shutil.copytree(tiny_model("qwen3", tied=True), tmp_path / "tied")
        tensors = load_file(copy / WEIGHTS)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + add
        save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
        return copy

    return build


def test_a_stored_repetition_is_accounted_for_and_not_exported(
    tied_copy: Callable[[float], Path], tmp_path: Path
) -> None:
    report = to_mcore(tied_copy(0.0), tmp_path / "mcore")
    assert report["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    to_hf(tmp_path / "mcore", tmp_path / "hf")
    assert "lm_head.weight" not in load_file(tmp_path / "hf" / WEIGHTS)


def test_a_repetition_that_differs_is_refused(
    tied_copy: Callable[[float], Path], tmp_path: Path
) -> None:
    with pytest.raises(WeightError, match="lm_head.weight differs from model.embed_tokens.weight"):
        to_mcore(tied_copy(1e-3), tmp_path / "mcore")


def test_export_casts_and_shards(mcore_dir: Path, tmp_path: Path) -> None:
    to_hf(mcore_dir, tmp_path / "hf", dtype=torch.bfloat16, max_shard_size="50KB")
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3
    tensors = {key: tensor for file in files for key, tensor in load_file(file).items()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
    check_against_architecture(tmp_path / "hf")


def edit_checkpoint(mcore_dir: Path, change: Callable[[dict], None]) -> None:
    """Rewrites the torch_dist folder with changed global tensors."""
    reader = TorchDistReader(mcore_dir / CHECKPOINT)
    tensors = {}
    for key in reader.keys():  # noqa: SIM118 - the reader is no mapping
        shape, _ = reader.info(key)
        tensors[key] = reader.read(key, (0,) * len(shape), shape)
    change(tensors)
    shutil.rmtree(mcore_dir / CHECKPOINT)
    chunks = [
        Chunk(key, tuple(t.shape), (0,) * t.ndim, tuple(t.shape), t.dtype, lambda t=t: t)
        for key, t in tensors.items()
    ]
    write_chunks(mcore_dir / CHECKPOINT, chunks)


EMBEDDING = "language_model.embedding.word_embeddings.weight"
MERGER = "vision_model.merger.linear_fc2.weight"


def test_the_padding_of_the_vocabulary_is_trimmed(mcore_dir: Path, tmp_path: Path) -> None:
    def pad(tensors: dict) -> None:
        tensors[EMBEDDING] = torch.nn.functional.pad(tensors[EMBEDDING], (0, 0, 0, 3))

    before = TorchDistReader(mcore_dir / CHECKPOINT)
    shape, _ = before.info(EMBEDDING)
    expected = before.read(EMBEDDING, (0, 0), shape)
    edit_checkpoint(mcore_dir, pad)
    to_hf(mcore_dir, tmp_path / "hf")
    found = load_file(tmp_path / "hf" / WEIGHTS)["model.language_model.embed_tokens.weight"]
    assert torch.equal(found, expected)


def longer(tensors: dict) -> None:
    tensors[MERGER] = torch.nn.functional.pad(tensors[MERGER], (0, 0, 0, 1))


def absent(tensors: dict) -> None:
    del tensors[MERGER]


def stray(tensors: dict) -> None:
    tensors[f"{MERGER}.extra"] = torch.ones(2)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (longer, rf"{MERGER}: shape \(49, 128\), expected \(48, 128\)"),
        (absent, f"{MERGER}: missing from the checkpoint"),
        (stray, f"{MERGER}.extra: in the checkpoint, but no row maps it"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    mcore_dir: Path, tmp_path: Path, change: Callable[[dict], None], fault: str
) -> None:
    edit_checkpoint(mcore_dir, change)
    with pytest.raises(WeightError, match=fault):
        to_hf(mcore_dir, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_lost_data_file_is_named(mcore_dir: Path, tmp_path: Path) -> None:
    lost = next((mcore_dir / CHECKPOINT).glob("*.distcp"))
    lost.unlink()
    with pytest.raises(WeightError, match=f"data files are missing: {lost.name}"):
        to_hf(mcore_dir, tmp_path / "hf")


@pytest.mark.parametrize("kept", [0, 100])
def test_damaged_metadata_is_named(mcore_dir: Path, tmp_path: Path, kept: int) -> None:
    path = mcore_dir / CHECKPOINT / ".metadata"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(WeightError, match=r"\.metadata: unreadable"):
        to_hf(mcore_dir, tmp_path / "hf")


def test_a_truncated_data_file_is_named(mcore_dir: Path, tmp_path: Path) -> None:
    file = next((mcore_dir / CHECKPOINT).glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(WeightError, match=file.name):
        to_hf(mcore_dir, tmp_path / "hf")


def test_a_box_without_a_chunk_is_refused(tmp_path: Path) -> None:
    half = Chunk("w", (4, 2), (0, 0), (2, 2), torch.float32, lambda: torch.ones(2, 2))
    write_chunks(tmp_path / "c", [half])
    with pytest.raises(WeightError, match="w: 4 of 8 elements are stored"):
        TorchDistReader(tmp_path / "c").read("w", (0, 0), (4, 2))


def test_a_box_is_put_together_from_any_tiling(tmp_path: Path) -> None:
    whole = torch.arange(48).reshape(6, 8)
    tiles = [
        Chunk(
            "w", (6, 8), (r, c), (2, 4), whole.dtype, lambda r=r, c=c: whole[r : r + 2, c : c + 4]
        )
        for r in (0, 2, 4)
        for c in (0, 4)
    ]
    write_chunks(tmp_path / "c", tiles)
    reader = TorchDistReader(tmp_path / "c")
    for offset, shape in (((0, 0), (6, 8)), ((1, 3), (4, 2)), ((5, 7), (1, 1)), ((2, 4), (2, 4))):
        r, c = offset
        expected = whole[r : r + shape[0], c : c + shape[1]]
        assert torch.equal(reader.read("w", offset, shape), expected)


def stored(checkpoint: Path) -> dict[str, object]:
    """Every entry of a torch_dist folder: tensors with shape and dtype, objects by name."""
    with (checkpoint / ".metadata").open("rb") as file:
        entries = pickle.load(file).state_dict_metadata
    return {
        key: (tuple(entry.size), entry.properties.dtype) if hasattr(entry, "size") else "object"
        for key, entry in entries.items()
    }


def padded(entries: dict[str, object]) -> dict[str, object]:
    """Megatron stores the vocabulary of 321 as its two ranks hold it."""
    names = ("embedding.word_embeddings", "output_layer")
    vocabulary = {f"language_model.{name}.weight" for name in names}
    assert {entries[key] for key in vocabulary} == {((321, 48), torch.float32)}
    return entries | dict.fromkeys(vocabulary, ((322, 48), torch.float32))


@pytest.mark.slow
def test_megatron_writes_what_we_write(
    mcore_dir: Path, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """And what it has trained at tensor parallel 2 comes back with the rest bit-identical."""
    launch(
        "tests.weights.megatron_saves",
        [str(mcore_dir), str(tmp_path / "saved"), str(tmp_path / "trained")],
        nproc_per_node=2,
        log_path=tmp_path / "log",
    )
    assert stored(tmp_path / "saved") == padded(stored(mcore_dir / CHECKPOINT))

    trained = tmp_path / "trained"
    entries = stored(trained / CHECKPOINT)
    assert any(key.startswith("optimizer.state.exp_avg_sq.") for key in entries)
    shutil.copytree(mcore_dir / SIDECAR, trained / SIDECAR)
    to_hf(trained, tmp_path / "hf")
    before, after = (
        load_file(folder / WEIGHTS) for folder in (tiny_model("qwen3_vl"), tmp_path / "hf")
    )
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key for key in before if ".merger." in key or "deepstack_merger" in key}


def test_reports_and_manifests_of_the_source_stay_behind(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """They tell of another artifact, and would change the digest with every build of it."""
    source = tmp_path / "source"
    shutil.copytree(tiny_model("qwen3_vl"), source)
    for name in ("MANIFEST.json", "proof.json", "swap_ledger.json", "precision.json"):
        (source / name).write_text("{}")
    to_mcore(source, tmp_path / "mcore")
    copied = {path.name for path in (tmp_path / "mcore" / "hf").iterdir()}
    kept = {path.name for path in tiny_model("qwen3_vl").iterdir() if path.suffix != ".safetensors"}
    assert copied == kept
