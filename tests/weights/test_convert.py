import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny.forms import as_hub
from tests.weights.checkpoints import Tensors, edit, load
from vlmcore.errors import WeightError
from vlmcore.training.launch import launch
from vlmcore.weights.architecture import check_against_architecture
from vlmcore.weights.convert import CHECKPOINT, REPORT, SIDECAR, to_hf, to_mcore
from vlmcore.weights.safetensors_io import tensor_bytes

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
    to_hf(mcore_dir, tmp_path / "hf", dtype="bfloat16", max_shard_size="50KB")
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3
    tensors = {key: tensor for file in files for key, tensor in load_file(file).items()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
    check_against_architecture(tmp_path / "hf")


EMBEDDING = "language_model.embedding.word_embeddings.weight"
MERGER = "vision_model.visual.merger.linear_fc2.weight"


def test_the_padding_of_the_vocabulary_is_trimmed(mcore_dir: Path, tmp_path: Path) -> None:
    def pad(tensors: Tensors) -> None:
        tensors[EMBEDDING] = torch.nn.functional.pad(tensors[EMBEDDING], (0, 0, 0, 3))

    expected = load(mcore_dir / CHECKPOINT)[EMBEDDING]
    edit(mcore_dir / CHECKPOINT, pad)
    to_hf(mcore_dir, tmp_path / "hf")
    found = load_file(tmp_path / "hf" / WEIGHTS)["model.language_model.embed_tokens.weight"]
    assert torch.equal(found, expected)


def longer(tensors: Tensors) -> None:
    tensors[MERGER] = torch.nn.functional.pad(tensors[MERGER], (0, 0, 0, 1))


def absent(tensors: Tensors) -> None:
    del tensors[MERGER]


def stray(tensors: Tensors) -> None:
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
    mcore_dir: Path, tmp_path: Path, change: Callable[[Tensors], None], fault: str
) -> None:
    edit(mcore_dir / CHECKPOINT, change)
    with pytest.raises(WeightError, match=fault):
        to_hf(mcore_dir, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


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


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_bytes_and_report_are_the_same_whatever_the_number_of_workers(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_model("qwen3_vl_moe")
    for count in (1, 3):
        to_mcore(source, tmp_path / f"mcore{count}", num_processes=count)
        to_hf(
            tmp_path / f"mcore{count}",
            tmp_path / f"hf{count}",
            max_shard_size="100KB",
            num_processes=count,
        )
    assert content(tmp_path / "mcore1") == content(tmp_path / "mcore3")
    assert content(tmp_path / "hf1") == content(tmp_path / "hf3")


def test_the_reports_of_both_directions_name_the_same_digests(
    mcore_dir: Path, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    there = json.loads((mcore_dir / REPORT).read_text())
    back = to_hf(mcore_dir, tmp_path / "hf")
    for field in ("tensors", "boxes", "digest", "bytes"):
        assert there[field] == back[field]
    files = load_file(tiny_model("qwen3_vl") / WEIGHTS)
    assert there["tensors"] == {key: sha256(tensor) for key, tensor in files.items()}
    stored = load(mcore_dir / CHECKPOINT)
    assert there["boxes"] == {
        label: sha256(stored[label.split("[")[0]][box_of(label)]) for label in there["boxes"]
    }


@pytest.mark.parametrize("written_by", ["to_mcore", "torch"])
def test_fused_experts_go_there_and_back_whoever_stored_them(
    written_by: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """As they come from the hub, input dimension first: stored as they are by us, not by torch."""
    source = as_hub(tiny_model("qwen3_vl_moe"), tmp_path / "source")
    there = to_mcore(source, tmp_path / "mcore")
    experts = {key: digest for key, digest in there["tensors"].items() if ".experts." in key}
    assert set(experts.values()) <= set(there["boxes"].values())
    if written_by == "torch":
        edit(tmp_path / "mcore" / CHECKPOINT, lambda tensors: None)
    back = to_hf(tmp_path / "mcore", tmp_path / "hf")
    assert there["tensors"] == back["tensors"]


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def box_of(label: str) -> tuple[slice, ...]:
    ranges = label[label.index("[") + 1 : -1]
    return tuple(slice(*map(int, one.split(":"))) for one in ranges.split(",") if one)


def test_torch_and_we_cast_alike_on_the_way_in(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    to_mcore(tiny_model("qwen3"), tmp_path / "plain")
    to_mcore(tiny_model("qwen3"), tmp_path / "cast", dtype="bfloat16")
    plain, found = (load(tmp_path / name / CHECKPOINT) for name in ("plain", "cast"))
    assert all(torch.equal(found[key], plain[key].to(torch.bfloat16)) for key in plain)


def test_float8_blocks_are_dequantized_on_the_way_in(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_model("qwen3"), tmp_path / "source")
    tensors = {key: tensor.bfloat16() for key, tensor in load_file(source / WEIGHTS).items()}
    expected = dict(tensors)
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        rows, columns = tensors[key].shape
        scale = 0.01 + torch.rand(-(-rows // 16), -(-columns // 16))
        spread = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)[:rows, :columns]
        codes = (tensors[key].float() / spread).to(torch.float8_e4m3fn)
        tensors |= {key: codes, f"{key}_scale_inv": scale}
        expected[key] = (codes.float() * spread).bfloat16()
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {
        "dtype": "bfloat16",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]},
    }
    (source / "config.json").write_text(json.dumps(config))
    report = to_mcore(source, tmp_path / "mcore")
    scaled = {key: f"{key}_scale_inv" for key in tensors if f"{key}_scale_inv" in tensors}
    assert report["dequantized"] == scaled
    assert report["keys_read"] == len(expected)
    to_hf(tmp_path / "mcore", tmp_path / "hf")
    found = load_file(tmp_path / "hf" / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())


def test_weights_of_a_wrong_dtype_are_named(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_model("qwen3"), tmp_path / "source")
    tensors = load_file(source / WEIGHTS)
    gate, up, norm = (
        f"model.layers.0.{name}.weight"
        for name in ("mlp.gate_proj", "mlp.up_proj", "input_layernorm")
    )
    tensors[up] = tensors[up].half()
    tensors[norm] = tensors[norm].int()
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(WeightError) as refusal:
        to_mcore(source, tmp_path / "mcore")
    assert f"{norm}: dtype int32, expected one of float64" in str(refusal.value)
    assert f"{up} is float16" in str(refusal.value)
    assert not (tmp_path / "mcore").exists()


def test_nothing_is_written_over(mcore_dir: Path, tiny_model: Callable[..., Path]) -> None:
    before = content(mcore_dir)
    with pytest.raises(WeightError, match="is already there; remove it or choose another"):
        to_mcore(tiny_model("qwen3_vl"), mcore_dir)
    assert content(mcore_dir) == before
