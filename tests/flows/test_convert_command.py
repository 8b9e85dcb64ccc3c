import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from flows import convert_command
from tests.tiny.adapters import save_adapter

WEIGHTS = "model.safetensors"


def vlmflow(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows", "convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_there_and_back_with_the_check(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source, mcore, hf = tiny_model("qwen3_vl"), tmp_path / "mcore", tmp_path / "hf"
    there = vlmflow("to-mcore", source, mcore, "--check", "--tp", 2, "--json")
    assert there.returncode == 0, there.stderr
    report = json.loads(there.stdout)
    tensors = load_file(source / WEIGHTS)
    assert report["keys_read"] == len(tensors)
    assert report["precision"] and all(row["passed"] for row in report["precision"])
    assert {row["layout"] for row in report["precision"]} == {"tp2"}
    back = vlmflow("to-hf", mcore, hf, "--max-shard-size", "100KB", "--json")
    assert back.returncode == 0, back.stderr
    assert json.loads(back.stdout)["digest"] == report["digest"]
    assert len(list(hf.glob("*.safetensors"))) > 1
    assert "GB/s" in back.stderr

    again = vlmflow("to-hf", mcore, hf)
    assert again.returncode == 2
    assert f"{hf} is already there" in again.stderr
    assert "Traceback" not in again.stderr


@pytest.mark.slow
def test_logits_past_the_tolerance_end_with_1_and_name_the_layer(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_command, "TOLERANCE", 1e-9)  # less than fp32 at TP 2 can give
    arguments = [str(tiny_model("qwen3")), str(tmp_path / "mcore"), "--check", "--tp", "2"]
    done = CliRunner().invoke(convert_command.convert_app, ["to-mcore", *arguments])
    assert done.exit_code == 1
    said = " ".join(done.stderr.split())
    assert "failed tp2, text: largest logit difference" in said
    assert "first apart at" in said


def test_a_merged_adapter_changes_the_tensors_it_names_and_no_other(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    base, merged = tiny_model("qwen3"), tmp_path / "merged"
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    done = vlmflow("merge-lora", base, adapter, merged, "--json")
    assert done.returncode == 0, done.stderr
    before, after = load_file(base / WEIGHTS), load_file(merged / WEIGHTS)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if "q_proj" in key}
    assert json.loads(done.stdout) == {"keys_written": len(before), "merged": sorted(changed)}


def test_a_damaged_source_is_a_sentence_and_not_a_traceback(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((tiny_model("qwen3") / "config.json").read_bytes())
    data = (tiny_model("qwen3") / WEIGHTS).read_bytes()
    (source / WEIGHTS).write_bytes(data[: len(data) // 2])
    done = vlmflow("to-mcore", source, tmp_path / "mcore")
    assert done.returncode == 2
    assert "error:" in done.stderr
    assert f"{WEIGHTS}: unreadable" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "mcore").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("to-hf", "a", "b", "--max-shard-size", "4GiB"), "expected a number and KB, MB or GB"),
        (("to-mcore", "a", "b", "--dtype", "int8"), "int8"),
        (("to-mcore", "a", "b", "--dtype", "float16", "--check"), "leave --dtype out"),
        (("to-mcore", "a", "b"), "config.json is missing"),
    ],
)
def test_wrong_use_is_explained(arguments: tuple[str, ...], words: str) -> None:
    done = vlmflow(*arguments)
    assert done.returncode == 2
    said = " ".join(done.stderr.replace("│", " ").split())  # out of typer's frame
    assert words in said
    assert "Traceback" not in done.stderr
