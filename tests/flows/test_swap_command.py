"""`vlmflow swap` as a user types it."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from vlmcore.errors import ProofError, WeightError


def swap(*arguments: object) -> dict:
    """Runs the command in this process; gives its JSON, or raises what `vlmflow` prints."""
    words = ["swap", *map(str, arguments), "--json"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_local_folders_become_one_model_beside_its_proof(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "swapped"
    donors = ("--vlm", tiny_model("qwen2_5_vl"), "--llm", f"path:{tiny_model('qwen3')}")
    printed = swap(*donors, "--out", out, "--shell", "exaone4_5")
    assert printed["out"] == str(out)
    assert printed["text_logits_max_diff"] == printed["vision_max_diff"] == 0.0
    assert printed["ledger"]["shell"] == "exaone4_5"
    assert set(printed["ledger"]["fresh"]) == {
        "model.visual.merger.mlp.2.weight",
        "model.visual.merger.mlp.2.bias",
    }
    proof = json.loads((out / "proof.json").read_text())
    assert printed == proof | {"out": str(out), "wall_s": printed["wall_s"]}
    assert [path.name for path in out.parent.iterdir()] == ["swapped"]  # no scratch is left


def test_a_refused_pair_leaves_no_folder(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    donors = ("--vlm", tiny_model("qwen2_5_vl"), "--llm", tiny_model("qwen3"))
    with pytest.raises(WeightError, match="--shell exaone4_5"):
        swap(*donors, "--out", tmp_path / "swapped")
    assert not list(tmp_path.iterdir())


def test_a_swap_whose_proof_fails_never_takes_its_name(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class that would scale the logits, as HyperCLOVAX does without being told not to."""
    from transformers import LlavaForConditionalGeneration

    forward = LlavaForConditionalGeneration.forward

    def scaled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 1.01
        return output

    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", scaled)
    donors = ("--vlm", tiny_model("llava"), "--llm", tiny_model("llama"))
    with pytest.raises(ProofError, match="text_logits_max_diff"):
        swap(*donors, "--out", tmp_path / "swapped")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_not_written_into(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    donors = ("--vlm", tiny_model("qwen3_vl"), "--llm", tiny_model("qwen3"))
    with pytest.raises(WeightError, match="exists already; name a new folder"):
        swap(*donors, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_builtin_donors_are_swapped_by_the_real_command(tmp_path: Path) -> None:
    words = ["swap", "--vlm", "builtin:tiny-qwen3-vl", "--llm", "builtin:tiny-qwen3"]
    words += ["--out", str(tmp_path / "swapped")]
    command = [sys.executable, "-m", "flows", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "text logits differ by 0.0, vision by 0.0" in done.stderr
    assert "starts random: model.visual.merger.linear_fc2.weight" in done.stderr
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "exists already" in again.stderr and "Traceback" not in again.stderr
