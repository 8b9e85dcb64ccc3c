import json

import pytest

from data_prep.holdout import write_holdout
from vlmcore.errors import DataError


def records_of(folder):
    return [json.loads(line) for line in (folder / "holdout.jsonl").read_text().splitlines()]


def test_a_record_is_the_test_rows_question_answer_and_image(numbers, tmp_path):
    report = write_holdout(numbers, tmp_path / "holdout")
    rows = [json.loads(line) for line in (numbers / "test.jsonl").read_text().splitlines()]
    records = records_of(tmp_path / "holdout")
    assert report.num_records == len(records) == len(rows) == 10
    for record, row in zip(records, rows, strict=True):
        assert record["id"] == row["id"]
        assert record["question"] == "Read the number."
        assert record["answer"] == row["messages"][1]["content"]
        image = tmp_path / "holdout" / record["image"]
        assert image.samefile(numbers / row["images"][0])


def test_limit_takes_the_first_records(numbers, tmp_path):
    write_holdout(numbers, tmp_path / "holdout", limit=3)
    ids = [record["id"] for record in records_of(tmp_path / "holdout")]
    assert ids == ["test-000001", "test-000002", "test-000003"]
    assert len(list((tmp_path / "holdout/images").iterdir())) == 3


def test_rows_that_are_not_one_question_about_one_image_are_counted(make_raw, row, tmp_path):
    chat = row()
    chat["messages"] = chat["messages"] + row("More?")["messages"]
    both = row("<image><image>?", images=["images/a.png", "images/b.jpg"])
    raw = make_raw(test=[row(), chat, both, row("No image?", images=()), b"{"])
    report = write_holdout(raw, tmp_path / "holdout")
    assert report.num_records == 1
    assert report.dropped == {"bad_json": 1, "not_one_question": 3}


def test_a_holdout_without_a_record_or_a_split_is_an_error(make_raw, row, tmp_path):
    raw = make_raw(test=[row("No image?", images=())])
    with pytest.raises(DataError, match="no row that asks one question about one image"):
        write_holdout(raw, tmp_path / "holdout")
    with pytest.raises(DataError, match="has no val split"):
        write_holdout(raw, tmp_path / "holdout", split="val")
