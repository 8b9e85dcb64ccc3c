from collections.abc import Callable
from pathlib import Path

import pytest

from vlmcore.errors import WeightError
from vlmcore.surgery.builtin import BUILTIN_DONORS
from vlmcore.surgery.donors import donor_fingerprint, fetch_donor
from vlmcore.weights.architecture import check_against_architecture


@pytest.mark.parametrize("name", sorted(BUILTIN_DONORS))
def test_a_builtin_donor_is_whole_and_follows_its_seed(name: str, tmp_path: Path) -> None:
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        fetch_donor(f"builtin:{name}", tmp_path / folder, seed=seed)
    check_against_architecture(tmp_path / "a")
    files = {
        folder: {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
        for folder in "abc"
    }
    assert files["a"] == files["b"]
    assert {name for name in files["a"] if files["a"][name] != files["c"][name]} == {
        "model.safetensors"
    }


def test_every_digit_is_one_token_in_both_donors(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    encoded = []
    for name in sorted(BUILTIN_DONORS):
        fetch_donor(f"builtin:{name}", tmp_path / name, seed=0)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        encoded.append(
            tokenizer("<|im_start|>user\nRead the number.0123456789<|im_end|>").input_ids
        )
        assert [tokenizer.decode(token) for token in encoded[-1][-11:-1]] == list("0123456789")
    assert encoded[0] == encoded[1]


def test_a_folder_is_a_donor(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_model("qwen3")
    fetch_donor(f"path:{source}", tmp_path / "copy", seed=0)
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {
        path.name for path in source.iterdir()
    }
    check_against_architecture(tmp_path / "copy")


def test_a_changed_folder_is_another_donor(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    fetch_donor(f"path:{tiny_model('qwen3')}", tmp_path, seed=0)
    name = f"path:{tmp_path}"
    before = donor_fingerprint(name)
    assert donor_fingerprint(name) == before
    with (tmp_path / "config.json").open("a") as file:
        file.write(" ")
    assert donor_fingerprint(name) != before


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        (
            "builtin:nowhere",
            "builtin:nowhere: no such donor; there are builtin:tiny-qwen3, builtin",
        ),
        ("path:/nowhere/at/all", "path:/nowhere/at/all: no config.json there"),
    ],
)
def test_a_donor_that_is_not_there_is_named(name: str, fault: str, tmp_path: Path) -> None:
    with pytest.raises(WeightError, match=fault):
        fetch_donor(name, tmp_path / "donor", seed=0)


def test_a_model_of_no_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(
        WeightError, match="model_type 'gpt2' has no family; known: exaone4_5, internvl"
    ):
        check_against_architecture(tmp_path)
