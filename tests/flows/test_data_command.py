"""`vlmflow data` as a person types it; one process a call, so few calls."""

import json
import shutil
import subprocess
import sys
import zipfile

import pytest
from PIL import Image
from typer.testing import CliRunner

from data_prep.sources import fetch
from data_prep.tables import find_tables
from flows.cli import app
from vlmcore.errors import DataError

run_cli = CliRunner().invoke


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(60):
            Image.new("RGB", (32 + i, 32), (4 * i, 0, 0)).save(folder / f"{i}.png")
            turns = [{"role": "user", "content": "<image>What?"},
                     {"role": "assistant", "content": f"{i}"}]  # fmt: skip
            file.write(json.dumps({"messages": turns, "images": [f"{i}.png"]}) + "\n")
        file.write('{"messages": [\n')
    return folder


def test_convert_prepare_and_audit_in_a_row(raw, tmp_path):
    out = tmp_path / "out"
    options = ["--format", "messages", "--max-bad-ratio", "0.1", "--workers", "1", "--json"]
    done = run_cli(app, ["data", "convert", str(raw / "rows.jsonl"), str(out), *options])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert (printed["samples"], printed["shards"]) == (60, 1)
    assert printed["dropped"] == {"bad_json": 1}
    done = run_cli(app, ["data", "prepare", str(out), "--split", "9,1,0", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["samples"] == {"train": 54, "val": 6}
    assert (out / ".nv-meta" / "index.sqlite").exists()
    assert not list(out.glob(".[dw]*"))
    done = run_cli(app, ["data", "audit", str(out), "--workers", "1", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["samples"] == {"train": 54, "val": 6}
    assert "data audit" in (out / "audit.html").read_text()


def test_any_source_of_a_recipe_is_fetched_and_leaves_nothing_behind(raw, tmp_path):
    shutil.make_archive(str(tmp_path / "packed"), "zip", raw)
    out, source = tmp_path / "out", f"file://{tmp_path / 'packed.zip'}#20"
    options = ["--format", "messages", "--workers", "1", "--json"]
    done = run_cli(app, ["data", "convert", source, str(out), *options])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["samples"] == 20
    assert sorted(path.name for path in out.iterdir()) == ["report.json", "train-000000.tar"]


def test_a_single_table_is_the_split_that_a_recipe_takes_it_for(raw, tmp_path):
    lines = (raw / "rows.jsonl").read_text().splitlines()[:60]
    table = raw / "validation.jsonl"
    table.write_text("\n".join(lines))
    fetch(f"path:{table}", tmp_path / "fetched", options={}, seed=0)
    assert list(find_tables(tmp_path / "fetched")) == ["val"]
    for number, told in enumerate(([], ["--split", "validation"])):
        call = ["data", "convert", str(table), str(tmp_path / f"out{number}"), "--workers", "1"]
        done = run_cli(app, [*call, *told, "--json"])
        assert json.loads(done.stdout)["splits"] == {"val": 60}
    for told, why in ((["--split", "train"], "no split 'train'"),
                      (["--subset", "b"], "no subset 'b'")):  # fmt: skip
        refused = run_cli(app, ["data", "convert", str(table), str(tmp_path / "none"), *told])
        assert why in str(refused.exception)


def test_images_in_an_archive_beside_the_table_are_unpacked(raw, tmp_path):
    """LLaVA-Pretrain as its repository has it; and all of it in one plain tar."""
    folder, options = tmp_path / "llava", ["--workers", "1", "--json", "--max-bad-ratio", "0.1"]
    folder.mkdir()
    shutil.copyfile(raw / "rows.jsonl", folder / "rows.jsonl")
    shutil.make_archive(str(tmp_path / "packed"), "tar", raw)
    (raw / "rows.jsonl").unlink()
    shutil.make_archive(str(folder / "images"), "zip", raw)
    for name in ("llava", "packed.tar"):
        done = run_cli(app, ["data", "convert", str(tmp_path / name), str(tmp_path / "out" / name),
                             *options])  # fmt: skip
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["images"] == 60


def test_nothing_of_a_refused_archive_stays(tmp_path):
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        archive.writestr("train.jsonl", '{"text": "Hi"}')
        archive.writestr("../out.png", "x")
    refused = run_cli(app, ["data", "convert", str(tmp_path / "packed.zip"), str(tmp_path / "out")])
    assert "leads out" in str(refused.exception)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_rows_that_were_refused_are_read_anew_when_they_have_been_mended(raw, tmp_path):
    call = ["data", "convert", str(raw), str(tmp_path / "out"), "--workers", "1", "--json",
            "--max-bad-ratio", "0.02"]  # fmt: skip
    (raw / "7.png").rename(tmp_path / "7.png")
    assert isinstance(run_cli(app, call).exception, DataError)
    (tmp_path / "7.png").rename(raw / "7.png")
    done = run_cli(app, call)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["dropped"] == {"bad_json": 1}


def test_a_group_is_in_one_split_alone(raw, tmp_path):
    rows = [json.loads(line) for line in (raw / "rows.jsonl").read_text().splitlines()[:60]]
    lines = [json.dumps({**row, "patient": f"p{i // 10}"}) for i, row in enumerate(rows)]
    (raw / "rows.jsonl").write_text("\n".join(lines))
    out = str(tmp_path / "out")
    told = ["--group-column", "patient", "--workers", "1"]
    assert run_cli(app, ["data", "convert", str(raw), out, *told]).exit_code == 0
    told = ["--split", "4,2,0", "--split-by", "group", "--json"]
    done = run_cli(app, ["data", "prepare", out, *told])
    assert json.loads(done.stdout)["samples"] == {"train": 40, "val": 20}


def test_every_folder_that_train_must_not_have_seen_is_searched_for(raw, tmp_path):
    rows = (raw / "rows.jsonl").read_text().splitlines()[:60]
    for name, few in {"ours": rows, "a/eval": rows[:3], "b/eval": rows[3:7]}.items():
        (raw / "rows.jsonl").write_text("\n".join(few))
        call = ["data", "convert", str(raw), str(tmp_path / name), "--workers", "1"]
        assert run_cli(app, call).exit_code == 0
    against = [f"--against={tmp_path / name / 'eval'}" for name in "ab"]
    done = run_cli(app, ["data", "audit", str(tmp_path / "ours"), *against, "--json"])
    assert json.loads(done.stdout)["held_out_media"] == 7


def test_what_was_fetched_is_kept_until_its_shards_are_whole(raw, tmp_path):
    shutil.make_archive(str(tmp_path / "packed"), "zip", raw)
    out, source = tmp_path / "out", f"path:{tmp_path / 'packed.zip'}"
    options = ["--format", "messages", "--workers", "1", "--json", "--max-bad-ratio"]
    refused = run_cli(app, ["data", "convert", source, str(out), *options, "0"])
    assert isinstance(refused.exception, DataError)
    (fetched,) = out.glob(".raw-*")
    assert (fetched / "59.png").exists()
    done = run_cli(app, ["data", "convert", source, str(out), *options, "0.1"])
    assert json.loads(done.stdout)["dropped"] == {"bad_json": 1}
    assert not list(out.glob(".*"))


BAD_CALLS = {
    "nothing there": (["convert", "gone.jsonl", "out"], "nothing is there"),
    "no table": (["convert", "raw/0.png", "out"], "no table of rows there"),
    "an unknown format": (["convert", "raw/rows.jsonl", "out", "--format", "csv"], "--format:"),
    "a bad column": (["convert", "raw/rows.jsonl", "out", "--column", "x"], "is not THEIRS=OURS"),
    "a limit of 0": (["convert", "raw/rows.jsonl#0", "out"], "--limit:"),
    "a ratio above 1": (["convert", "raw/rows.jsonl", "out", "--max-bad-ratio", "2"], "ratio:"),
    "too many bad rows": (["convert", "raw/rows.jsonl", "out", "--max-bad-ratio", "0"],
                          "1 x bad_json, as rows.jsonl:61"),
    "not empty": (["convert", "raw/rows.jsonl", "raw"], "is not empty"),
    "no shards": (["prepare", "raw"], "has no report.json"),
    "a split of letters": (["prepare", "raw", "--split", "a,b"], "train,val,test ratios"),
    "no shards to audit": (["audit", "raw"], "has no report.json"),
}  # fmt: skip


@pytest.mark.slow
def test_a_users_error_is_a_sentence_and_exit_code_2(raw):
    for name, (arguments, sentence) in BAD_CALLS.items():
        done = subprocess.run(
            [sys.executable, "-m", "flows", "data", *arguments],
            cwd=raw.parent, capture_output=True, text=True, env={"PYTHONPATH": ".:" + ROOT},
        )  # fmt: skip
        assert done.returncode == 2, (name, done.stderr)
        assert sentence in " ".join(done.stderr.split()), name
        assert "Traceback" not in done.stderr, name


ROOT = __file__.rpartition("/tests/")[0]
