"""The whole demo at a smaller size, with the real components, and what users do to it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlmcore.artifacts import Store

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("demo")]

RECIPE = "handwritten_numbers"
SMALL = {
    "data.numbers.options": "{train: 300, val: 10, test: 30}",
    "data.spelling.options": "{train: 300, val: 10}",
    "train.teach.train_iters": "20",
    "train.align.train_iters": "6",
    "train.full.train_iters": "12",
    "train.full.save_interval": "4",
    "convert.tensor_model_parallel_size": "[1, 2]",
    "serve.engine": "transformers",
    "evaluate.holdout.checkpoints": "[full]",
    "gates": "['full.holdout.exact_match >= 0.0']",
}
STAGES = [
    "data.numbers.raw", "data.spelling.raw", "data.numbers.shards", "data.spelling.shards",
    "data.numbers.energon", "data.spelling.energon", "data.numbers.holdout", "data.numbers.audit",
    "data.spelling.audit", "model.vlm", "model.llm", "to_mcore.llm", "train.teach", "export.teach",
    "swap", "to_mcore", "train.align", "export.align", "train.full", "export.full",
    "evaluate.full.holdout", "report",
]  # fmt: skip


def command(store: Path, *arguments: str, **changed: str) -> list[str]:
    values = SMALL | {name.replace("__", "."): value for name, value in changed.items()}
    sets = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
    return [sys.executable, "-m", "flows", "run", RECIPE, "--store", str(store), "--json",
            *sets, *arguments]  # fmt: skip


def environment(store: Path) -> dict[str, str]:
    home = store.parent / "prefect"
    home.mkdir(parents=True, exist_ok=True)
    env = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    return env | {"PREFECT_HOME": str(home)}


def run(store: Path, *arguments: str, **changed: str) -> dict:
    done = subprocess.run(
        command(store, *arguments, **changed),
        env=environment(store),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    *before, last = done.stdout.splitlines()
    assert before == []  # one object, alone on standard output
    return json.loads(last)


def states(result: dict) -> dict[str, str]:
    return {stage["name"]: stage["state"] for stage in result["stages"]}


def ran(result: dict) -> list[str]:
    return [stage["name"] for stage in result["stages"] if stage["state"] == "ran"]


def losses(store: Path) -> list[float]:
    opened = Store(store)
    folder = opened.ref(opened.resolve("train.full")).path
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().split("\n")
            if line]  # fmt: skip


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A finished run: its store and what it printed."""
    store = tmp_path_factory.mktemp("demo") / "store"
    return store, run(store)


@pytest.fixture
def store(first, tmp_path):
    """A copy of the finished run's store."""
    copy = tmp_path / "store"
    shutil.copytree(first[0], copy, symlinks=True)
    return copy


def test_every_stage_runs_and_the_report_is_there(first):
    store, result = first
    assert ran(result) == STAGES
    assert all(len(stage["digest"]) == 64 for stage in result["stages"])
    assert set(result["scores"]) == {"full"}
    assert set(result["scores"]["full"]) == {"holdout.exact_match"}
    assert result["gates"] == [
        {
            "gate": "full.holdout.exact_match >= 0.0",
            "value": result["scores"]["full"]["holdout.exact_match"],
            "passed": True,
        }
    ]
    page = Path(result["report"]).read_text()
    assert "data:image/png;base64," in page
    for proof in ("Swap proof", "Precision", "Export reload"):
        assert f"{proof} passed" in page, proof
    assert "cannot be read" not in page


def test_a_second_run_executes_nothing(first):
    store, before = first
    again = run(store)
    assert ran(again) == []
    assert [s["digest"] for s in again["stages"]] == [s["digest"] for s in before["stages"]]
    assert again["scores"] == before["scores"]


def test_refresh_runs_one_stage_and_nothing_after_it_when_its_digest_stays(store, first):
    again = run(store, "--refresh", "swap")
    assert ran(again) == ["swap"]
    assert again["scores"] == first[1]["scores"]


def test_another_value_reruns_from_there(store):
    again = run(store, "--until", "train.full", train__full__learning_rate="5e-4")
    assert ran(again) == ["train.full"]


def test_training_on_the_fly_gives_the_same_weights_without_a_megatron_checkpoint(store):
    weights = {}
    for convert in ("false", "true"):
        run(store, "--until", "export.align", convert__on_the_fly=convert)
        opened = Store(store)
        folder = opened.ref(opened.resolve("export.align")).path
        weights[convert] = (folder / "model.safetensors").read_bytes()
        assert (folder / "precision.json").is_file()
    trained = opened.ref(opened.resolve("train.align")).path
    assert not (trained / "checkpoint").exists()
    assert (trained / "model.safetensors").is_file()
    assert weights["true"] == weights["false"]


def test_from_refuses_to_build_what_comes_before_it(tmp_path):
    done = subprocess.run(
        command(tmp_path / "store", "--from", "train.full"),
        env=environment(tmp_path / "store"), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--from train.full: data.numbers.raw comes before it" in done.stderr


def test_an_unknown_stage_is_named_with_those_that_exist(store):
    done = subprocess.run(
        command(store, "--refresh", "train.fill"),
        env=environment(store), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no stage is named 'train.fill'" in done.stderr and "train.full" in done.stderr


def test_a_missed_gate_ends_with_3_after_the_report(store):
    done = subprocess.run(
        command(store, gates="['holdout.exact_match >= 1.01']"),
        env=environment(store), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr[-2000:]
    assert json.loads(done.stdout)["gates"][0]["passed"] is False
    assert Path(json.loads(done.stdout)["report"]).is_file()


def test_a_corrupt_byte_is_found_set_aside_and_rebuilt(store, first):
    victim = next((store / "objects" / "swap").glob("*/model.safetensors"))
    stat = victim.stat()
    data = bytearray(victim.read_bytes())
    data[-100] ^= 1
    victim.write_bytes(data)
    os.utime(victim, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a failing disk would
    verify = [sys.executable, "-m", "flows", "artifacts", "verify", "--json", "--store", str(store)]
    done = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (bad,) = json.loads(done.stdout)["bad"]
    assert (bad["stage"], bad["path"], bad["cause"]) == ("swap", "model.safetensors", "sha256")
    again = run(store)
    assert ran(again) == ["swap"]
    assert again["scores"] == first[1]["scores"]
    assert subprocess.run(verify, capture_output=True, check=False).returncode == 0


def test_a_killed_training_goes_on_from_its_last_checkpoint(store, first):
    expected = losses(store)
    # the same training under a store that lacks it
    shutil.rmtree(store / "objects" / "train.full")
    process = subprocess.Popen(
        command(store, "--until", "train.full"),
        env=environment(store), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    work = store / "work" / "train.full"
    deadline = time.monotonic() + 120
    while not list(work.glob("*/scratch/iter_0000004")) and not list(
        work.glob("*/scratch/iter_0000008")
    ):
        assert process.poll() is None, process.communicate()[1].decode()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (store / "objects" / "train.full").exists() or not list(
        (store / "objects" / "train.full").iterdir()
    )
    deadline = time.monotonic() + 30  # the ranks end with their owner
    while "vlmcore.training.main" in subprocess.run(
        ["ps", "-eo", "args"], capture_output=True, text=True, check=True
    ).stdout.replace(str(os.getpid()), ""):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    again = run(store)
    assert ran(again)[:1] == ["train.full"]
    resumed = losses(store)
    assert len(resumed) == len(expected) == int(SMALL["train.full.train_iters"])
    assert resumed == pytest.approx(expected, abs=1e-5)
    assert again["scores"] == first[1]["scores"]


def test_two_runs_race_for_one_artifact_and_one_builds_it(tmp_path):
    store = tmp_path / "store"
    racers = [
        subprocess.Popen(
            command(store, "--until", "data.numbers.raw"),
            env=environment(tmp_path / str(i) / "store"), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]  # fmt: skip
    outputs = [racer.communicate() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], outputs
    found = [states(json.loads(out))["data.numbers.raw"] for out, _ in outputs]
    assert sorted(found) == ["cached", "ran"]
