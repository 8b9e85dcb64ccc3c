import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.sources import Wanted, fetch, fingerprint, handwritten_numbers
from vlmcore.errors import DataError
from vlmcore.recipe.schema import Dataset

SMALL = {"train": 5, "val": 2, "test": 3}


def rows_of(raw, split):
    return [json.loads(line) for line in (raw / f"{split}.jsonl").read_text().splitlines()]


def test_the_same_seed_writes_the_same_bytes(tmp_path, tree_digest):
    for name, seed in (("one", 7), ("again", 7), ("other", 8)):
        fetch("builtin:handwritten_numbers", tmp_path / name, options=SMALL, seed=seed)
    assert tree_digest(tmp_path / "one") == tree_digest(tmp_path / "again")
    assert tree_digest(tmp_path / "one") != tree_digest(tmp_path / "other")


def test_no_scan_is_in_two_splits():
    pools = handwritten_numbers.scan_pools()
    scans = np.concatenate(list(pools.values()))
    assert sorted(scans) == list(range(1797))
    assert all(len(pool) == handwritten_numbers.POOL_SIZES[split] for split, pool in pools.items())


def test_pictures_show_scans_of_their_own_split_and_the_digits_of_their_answer(tmp_path):
    from sklearn.datasets import load_digits

    # At 8 pixels a digit a picture is made of the scans' own pixels.
    fetch("builtin:handwritten_numbers", tmp_path, options={**SMALL, "digit_px": 8}, seed=0)
    scans = load_digits()
    for split, pool in handwritten_numbers.scan_pools().items():
        known = {(16 - scans.images[index]).tobytes(): scans.target[index] for index in pool}
        for row in rows_of(tmp_path, split):
            picture = np.asarray(Image.open(tmp_path / row["images"][0]).convert("L"))
            found = [
                known[np.round(picture[:, at : at + 8] * (16 / 255)).tobytes()]
                for at in range(0, picture.shape[1], 8)
            ]
            assert "".join(map(str, found)) == row["messages"][1]["content"]


def test_a_picture_is_digit_px_high_and_digit_px_a_digit_wide(numbers):
    lengths = set()
    for row in rows_of(numbers, "train"):
        answer = row["messages"][1]["content"]
        with Image.open(numbers / row["images"][0]) as picture:
            assert (picture.size, picture.mode) == ((32 * len(answer), 32), "RGB")
        lengths.add(len(answer))
    assert lengths == {1, 2, 3, 4}


def test_written_numbers_repeat_in_the_answer_what_stands_in_the_question(tmp_path):
    fetch("builtin:written_numbers", tmp_path, options={"train": 50}, seed=3)
    rows = rows_of(tmp_path, "train")
    for row in rows:
        question, answer = (turn["content"] for turn in row["messages"])
        assert question == f"<|vision_start|>{answer}<|vision_end|>Read the number."
        assert "images" not in row
    assert len(rows) == 50
    assert len({row["messages"][1]["content"] for row in rows}) > 30


def test_a_folder_is_taken_as_it_is(make_raw, row, tmp_path, tree_digest):
    raw = make_raw(train=[row()], test=[row()])
    fetch(f"path:{raw}", tmp_path / "fetched", options={}, seed=0)
    assert tree_digest(tmp_path / "fetched") == tree_digest(raw)


def test_a_jsonl_file_brings_only_the_images_that_its_rows_name(make_raw, row, tmp_path):
    rows = [row(), b"{not json", row(images=["../outside.png"]), row(images=["images/gone.png"])]
    raw = make_raw(mine=rows)
    (tmp_path / "outside.png").write_bytes(b"secret")
    fetch(f"path:{raw / 'mine.jsonl'}", tmp_path / "fetched", options={}, seed=0)
    files = {file.relative_to(tmp_path / "fetched").as_posix()
             for file in (tmp_path / "fetched").rglob("*") if file.is_file()}  # fmt: skip
    assert files == {"mine.jsonl", "images/a.png"}


def test_the_fingerprint_follows_an_edit_of_any_file(make_raw, row):
    raw = make_raw(train=[row()])
    source = f"path:{raw}"
    first = fingerprint(source)
    assert fingerprint(source) == first
    image = raw / "images" / "a.png"
    image.write_bytes(image.read_bytes()[:-1] + b"\0")
    os.utime(image, ns=(1, 1))
    assert fingerprint(source) != first


def test_the_fingerprint_of_a_builtin_is_its_name_and_version():
    assert fingerprint("builtin:handwritten_numbers") == "builtin:handwritten_numbers@1"


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("gopher:data", {}, "builtin:…, hf:…, http:…, https:…, modelscope:…, path:…, s3:…"),
        ("data.jsonl", {}, "not known"),
        ("builtin:handwriting", {}, "builtin:handwritten_numbers, builtin:written_numbers"),
        ("builtin:written_numbers", {"trian": 5}, "trian.*Its options are train, val"),
        ("builtin:handwritten_numbers", {"digit_px": 0}, "digit_px"),
        ("path:/no/such/folder", {}, "nothing is there"),
        ("path:.", {"train": 5}, "has no options"),
    ],
)
def test_an_unknown_source_or_option_is_named_with_the_known_ones(
    source, options, message, tmp_path
):
    with pytest.raises(DataError, match=message):
        fetch(source, tmp_path / "raw", options=options, seed=0)


def test_importing_the_sources_loads_neither_scikit_learn_nor_torch():
    code = "import sys, data_prep.sources, data_prep.shards, data_prep.energon, data_prep.holdout\n"
    code += "sys.exit(bool({'sklearn', 'torch', 'megatron'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_json_table_brings_the_images_that_its_rows_name(make_raw, tmp_path):
    raw = make_raw(train=[])
    rows = [{"image": "images/a.png", "conversations": []}, {"image": "../b.png"}, "no row", {}]
    (raw / "chats.json").write_text(json.dumps(rows))
    fetch(f"path:{raw / 'chats.json'}", tmp_path / "fetched", options={}, seed=0)
    found = {path.name for path in (tmp_path / "fetched").rglob("*") if path.is_file()}
    assert found == {"chats.json", "a.png"}


def test_files_that_content_parts_and_columns_of_any_name_tell_come_along(make_raw, tmp_path):
    parts = [{"type": "image", "image": "images/a.png"}, {"type": "text", "text": "gone.png"}]
    raw = make_raw(
        train=[{"messages": [{"role": "user", "content": parts}]}, {"picture": "images/b.jpg"},
               {"audios": ["a.wav"], "images": ["x" * 5000 + ".png", "图" * 200 + ".png"]},
               {"from": "other.jsonl"}],
    )  # fmt: skip
    (raw / "a.wav").write_bytes(b"RIFF")
    (raw / "other.jsonl").write_text("{}")
    (raw / "README").write_text("no row names it")
    fetch(f"path:{raw / 'train.jsonl'}", tmp_path / "copy", options={}, seed=0)
    found = {path.name for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    assert found == {"train.jsonl", "a.png", "b.jpg", "a.wav"}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "arrow"])
def test_a_single_table_brings_the_files_of_its_media_dir(kind, make_raw, tmp_path):
    raw = make_raw()
    row = {"image": "a.png", "more": [{"of": ["b.jpg", None]}], "data": b"\xff.png"}
    table, columns = raw / f"mine.{kind}", pa.Table.from_pylist([row, {**row, "more": None}])
    if kind == "parquet":
        pq.write_table(columns, table)
    elif kind == "arrow":
        with pa.OSFile(str(table), "wb") as sink, pa.ipc.new_stream(sink, columns.schema) as writer:
            writer.write_table(columns)
    elif kind == "csv":
        table.write_text("image,more\na.png,b.jpg\n")
    else:
        table.write_text(json.dumps({"image": "a.png", "more": "b.jpg"}))
    dataset = Dataset(source=f"path:{table}", media_dir="images/")
    fetch(dataset.source, tmp_path / "got", options={}, seed=0, wanted=Wanted.of(dataset))
    found = {path.name for path in (tmp_path / "got" / "images").iterdir()}
    assert found == {"a.png", "b.jpg"}


def test_what_a_hub_is_asked_for_does_not_depend_on_the_media_dir():
    assert Wanted.of(Dataset(source="hf:me/numbers", media_dir="images")) == Wanted()


def test_include_chooses_among_the_files_of_a_folder(make_raw, row, tmp_path):
    raw = make_raw(train=[row()], test=[row()])
    wanted = Wanted(include=("test.jsonl", "images/*.png"))
    fetch(f"path:{raw}", tmp_path / "fetched", options={}, seed=0, wanted=wanted)
    found = {path.name for path in (tmp_path / "fetched").rglob("*") if path.is_file()}
    assert found == {"test.jsonl", "a.png"}
    assert fingerprint(f"path:{raw}", wanted=wanted) != fingerprint(f"path:{raw}")


@pytest.mark.parametrize("source", ["builtin:written_numbers", "https://host/a.zip"])
def test_what_a_source_cannot_heed_is_refused(source):
    with pytest.raises(DataError, match="has no revision and no include to choose by"):
        fingerprint(source, wanted=Wanted(revision="v1", include=("*",)))


def test_a_word_behind_a_hubs_source_is_its_subset():
    dataset = Dataset(source="modelscope:AI-ModelScope/LaTeX_OCR:human_handwrite#5000")
    assert dataset.source == "modelscope:AI-ModelScope/LaTeX_OCR"
    assert (dataset.subset, dataset.limit) == ("human_handwrite", 5000)
    assert Dataset(source="hf:me/numbers:a", subset=None).subset == "a"  # as the command line says
    assert Dataset(source="https://host:8080/a.zip").subset is None
    with pytest.raises(ValueError, match="subset: b, but the source says :a; leave one of them"):
        Dataset(source="hf:me/numbers:a", subset="b")


def test_a_number_behind_the_source_is_its_limit():
    dataset = Dataset(source="hf:me/numbers#5000")
    assert (dataset.source, dataset.limit) == ("hf:me/numbers", 5000)
    web = "https://host/a.zip#sha256=" + 64 * "0"
    assert (Dataset(source=web).source, Dataset(source=web).limit) == (web, None)
    assert Dataset(source=f"{web}#7").limit == 7
    with pytest.raises(ValueError, match="limit: 3, but the source says #5; leave one of them out"):
        Dataset(source="hf:me/numbers#5", limit=3)
    with pytest.raises(ValueError, match="greater than 0"):
        Dataset(source="hf:me/numbers#0")
