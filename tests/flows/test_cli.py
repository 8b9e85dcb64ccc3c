"""What the command line says and how it ends; nothing is built here."""

import json
import subprocess
import sys

import pytest


def vlmflow(*arguments: str, cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "flows", *arguments],
        capture_output=True, text=True, check=False, cwd=cwd,
    )  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [[], ["run"], ["plan"], ["up"], ["artifacts"], ["artifacts", "verify"], ["recipe", "check"]],
    ids=" ".join,
)
def test_every_command_has_help(command):
    done = vlmflow(*command, "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout


def test_a_plan_of_an_empty_store_runs_everything(tmp_path):
    done = vlmflow("plan", "handwritten_numbers", "--json", "--store", str(tmp_path / "store"))
    assert done.returncode == 0, done.stderr
    stages = json.loads(done.stdout)["stages"]
    assert [stage["state"] for stage in stages] == ["to run"] * len(stages)
    assert not (tmp_path / "store").exists()  # a plan writes nothing


@pytest.mark.parametrize(
    ("until", "last"), [("to_mcore", "to_mcore"), ("train", "train.full"), ("model", "model.llm")]
)
def test_until_means_the_last_stage_of_that_name(tmp_path, until, last):
    """`to_mcore.llm` and `train.teach` stand long before `to_mcore` and `train.full`."""
    store = str(tmp_path / "store")
    done = vlmflow("plan", "handwritten_numbers", "--until", until, "--json", "--store", store)
    assert json.loads(done.stdout)["stages"][-1]["name"] == last


def test_faults_of_a_recipe_come_all_at_once_with_their_lines(tmp_path):
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(
        "name: bad\nmodel: {vlm: builtin:tiny-qwen3-vl}\n"
        "data: {numbers: {source: builtin:handwritten_numbers}}\n"
        "train:\n  - name: align\n    data: [numbers]\n    lr: 1e-3\n    train_iters: ten\n"
    )
    done = vlmflow("run", str(recipe))
    assert done.returncode == 2
    assert "bad.yaml:7: train.align.lr" in done.stderr and "learning_rate" in done.stderr
    assert "bad.yaml:8: train.align.train_iters" in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_trainable_is_refused_before_anything_runs(tmp_path):
    done = vlmflow(
        "run", "handwritten_numbers", "--store", str(tmp_path / "store"),
        "--set", "train.full.freeze_vit=true", "--set", "train.full.freeze_aligner=true",
        "--set", "train.full.freeze_llm=true",
    )  # fmt: skip
    assert done.returncode == 2
    assert "train.full" in done.stderr and "nothing is trainable" in done.stderr
    assert not (tmp_path / "store").exists()


def test_a_recipe_that_is_not_there_is_named_with_those_that_are():
    done = vlmflow("plan", "handwriten_numbers")
    assert done.returncode == 2
    assert "handwriten_numbers" in done.stderr and "handwritten_numbers" in done.stderr


def test_the_schema_of_a_recipe_is_json():
    schema = json.loads(vlmflow("recipe", "schema").stdout)
    assert "train" in schema["properties"]


def test_an_empty_store_verifies(tmp_path):
    done = vlmflow("artifacts", "verify", "--json", "--store", str(tmp_path))
    assert (done.returncode, json.loads(done.stdout)) == (0, {"bad": []})
