import json

import pytest

from data_prep.audit import audit_shards
from data_prep.audit_page import describe, histogram, write_page
from data_prep.holdout import write_holdout
from data_prep.shards import write_shards
from tests.data_prep.conftest import gradient


@pytest.fixture
def raw(tmp_path):
    """Twenty pictures; val shows one of train's bytes again, and one of them smaller."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for i in range(20):
        picture = gradient(150, 100).rotate(18 * i, expand=True)
        picture.save(folder / f"{i}.png")
        if i == 7:
            picture.resize((picture.width // 2, picture.height // 2)).save(folder / "smaller.jpg")
    rows = {
        "train": [(f"{i}.png", f"picture {i}") for i in range(20)] + [("3.png", "picture 3")],
        "val": [("3.png", "held out"), ("smaller.jpg", "held out too")],
    }
    for split, found in rows.items():
        lines = [
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": "<image>What?"},
                        {"role": "assistant", "content": answer},
                    ],
                    "images": [name],
                }
            )
            for name, answer in found
        ]
        (folder / f"{split}.jsonl").write_text("\n".join([*lines, "{"]))
    return folder


def test_the_audit_counts_drops_duplicates_and_leaks(raw, tmp_path):
    write_shards(raw, tmp_path / "shards", max_bad_ratio=0.5, num_workers=1)
    found = audit_shards(tmp_path / "shards")
    assert found.figures() | {"tokens": 0, "longest_sample_tokens": 0} == {
        "samples": {"train": 21, "val": 2}, "images": 23, "dropped": {"bad_json": 2},
        "undecodable": 0, "duplicates": 1, "near_duplicates": 0, "leaks": 3, "held_out_media": 2,
        "tokens": 0, "tokens_are_estimated": True, "longest_sample_tokens": 0,
    }  # fmt: skip
    assert found.duplicates == {"train-000021": ("duplicate", "train-000004")}
    assert found.leaks == [
        ("train-000004", "val-000001", "the same bytes"),
        ("train-000008", "val-000002", "looks the same"),
        ("train-000021", "val-000001", "the same bytes"),
    ]
    assert (150, 100) in found.sizes
    assert len(found.shown) == 16


def test_workers_do_not_change_it_and_a_tokenizer_counts(raw, tmp_path):
    write_shards(
        raw, tmp_path / "shards", max_bad_ratio=0.5, num_workers=1, max_samples_per_shard=6
    )
    one = audit_shards(tmp_path / "shards")
    two = audit_shards(tmp_path / "shards", num_workers=2)
    assert one == two
    counted = audit_shards(tmp_path / "shards", count_tokens=lambda text: len(text.split()))
    assert not counted.is_token_estimate
    assert counted.num_tokens[0] == len(["What?picture", "0"]) + -(-150 // 28) * -(-100 // 28)


def test_a_holdout_is_looked_for_in_train(raw, tmp_path):
    write_shards(raw, tmp_path / "shards", max_bad_ratio=0.5, num_workers=1)
    (raw / "test.jsonl").write_text((raw / "train.jsonl").read_text().splitlines()[11])
    write_holdout(raw, tmp_path / "asked")
    found = audit_shards(tmp_path / "shards", against={"asked": tmp_path / "asked"})
    assert ("train-000012", "asked/test-000001", "the same bytes") in found.leaks


def test_the_page_says_where_nothing_is_held_out(raw, tmp_path):
    (raw / "val.jsonl").unlink()
    write_shards(raw, tmp_path / "shards", max_bad_ratio=0.5, num_workers=1)
    found = describe(audit_shards(tmp_path / "shards"))
    assert (found["figures"]["held_out_media"], found["figures"]["leaks"]) == (0, 0)
    write_page(found, tmp_path / "audit.html", title="pictures")
    assert "there was nothing to look for" in (tmp_path / "audit.html").read_text()


def test_the_page_stands_alone_and_escapes_what_rows_say(raw, tmp_path):
    text = (raw / "train.jsonl").read_text().replace("picture 0", "<script>alert(1)</script>")
    (raw / "train.jsonl").write_text(text)
    write_shards(raw, tmp_path / "shards", max_bad_ratio=0.5, num_workers=1)
    found = json.loads(json.dumps(describe(audit_shards(tmp_path / "shards"))))
    write_page(found, tmp_path / "audit.html", title="pictures")
    page = (tmp_path / "audit.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert page.count("data:image/jpeg;base64,") == 16
    assert page.count("http") == page.count("http://www.w3.org/2000/svg")
    assert page.count("<svg") == 3
    assert "train.jsonl:22" in page  # the line that is not JSON


@pytest.mark.parametrize("values", [[], [7], [0, 0], [1, 10, 100, 1000]])
def test_every_value_falls_into_a_bar(values):
    assert sum(bar[4] for bar in histogram("x", values).bars) == len(values)
