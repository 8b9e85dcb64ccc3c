import json

import pytest

from data_prep.causes import BadRowError
from data_prep.samples import RowReader
from data_prep.shards import write_shards
from data_prep.splits import Deal, deal, iter_samples, parse_split
from tests.data_prep.conftest import gradient
from vlmcore.errors import DataError

NUM_IMAGES = 30


@pytest.fixture
def shards(tmp_path):
    """120 samples over 30 images; every fifth sample shows two, so that images hang together."""
    raw = tmp_path / "raw"
    raw.mkdir()
    for i in range(NUM_IMAGES):
        gradient(20 + i, 20).save(raw / f"{i}.png")
    with (raw / "train.jsonl").open("w") as file:
        for n in range(120):
            images = [f"{n % NUM_IMAGES}.png"]
            if n % 30 == 0:
                images.append(f"{(n + 1) % NUM_IMAGES}.png")
            turns = [{"role": "user", "content": "<image>" * len(images) + f"{n}?"},
                     {"role": "assistant", "content": f"{n}."}]  # fmt: skip
            row = {"messages": turns, "images": images, "patient": f"p{n % 7}"}
            file.write(json.dumps(row) + "\n")
    write_shards(
        raw, tmp_path / "shards", max_bad_ratio=0, num_workers=1,
        reader=RowReader(raw, group_column="patient"), max_samples_per_shard=50,
    )  # fmt: skip
    return tmp_path / "shards"


def dealt(shards, tmp_path, **how):
    report = deal(shards, tmp_path / "dealt", Deal(**how), max_samples_per_shard=40)
    return report, list(iter_samples(tmp_path / "dealt"))


def test_no_image_is_in_two_splits_and_sizes_follow_the_ratios(shards, tmp_path):
    report, samples = dealt(shards, tmp_path, split=(8, 1, 1))
    where = {}
    for split, _, members in samples:
        for name, data in members.items():
            if name != "json":
                assert where.setdefault(data, split) == split
    assert len(where) == NUM_IMAGES
    assert sum(report.samples.values()) == 120
    assert report.samples["train"] == pytest.approx(96, abs=6)
    assert report.samples["val"] == pytest.approx(12, abs=6)
    assert report.num_images == 124


def test_samples_keep_their_keys_and_bytes(shards, tmp_path):
    before = {key: members for _, key, members in iter_samples(shards)}
    _, samples = dealt(shards, tmp_path, split=(1, 1, 1))
    assert {key: members for _, key, members in samples} == before


def test_a_group_stays_together(shards, tmp_path):
    _, samples = dealt(shards, tmp_path, split=(2, 1, 1), split_by="group")
    splits = {}
    for split, _, members in samples:
        splits.setdefault(json.loads(members["json"])["group"], set()).add(split)
    assert len(splits) == 7
    assert all(len(found) == 1 for found in splits.values())


def test_by_sample_the_ratios_are_met_to_the_sample(shards, tmp_path):
    report, _ = dealt(shards, tmp_path, split=(9, 1, 0), split_by="sample")
    assert report.samples == {"train": 108, "val": 12}


def test_another_seed_deals_otherwise_and_the_same_one_the_same(shards, tmp_path, tree_digest):
    digests = []
    for number, seed in enumerate((1, 1, 2)):
        deal(shards, tmp_path / str(number), Deal(split=(1, 1, 0), seed=seed))
        digests.append(tree_digest(tmp_path / str(number)))
    assert digests[0] == digests[1] != digests[2]


def test_a_split_that_would_stay_empty_is_an_error(shards, tmp_path):
    with pytest.raises(DataError, match="leave val empty at 1000,0.01,0"):
        dealt(shards, tmp_path, split=(1000, 0.01, 0))


@pytest.mark.parametrize("text", ["", "a,b", "1,2,3,4", "-1,2", "0,0,0", "nan"])
def test_ratios_that_make_no_sense_are_refused(text):
    with pytest.raises(DataError, match="is none of train,val,test ratios"):
        parse_split(text)


def test_repeated_samples_are_left_out_but_the_first(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    picture = gradient(200, 150)
    picture.save(raw / "a.png")
    picture.resize((100, 75)).save(raw / "smaller.jpg", quality=70)
    gradient(150, 200).rotate(90).save(raw / "other.png")
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "A."}]
    names = ["a.png", "smaller.jpg", "a.png", "other.png"]
    lines = [json.dumps({"messages": turns, "images": [name]}) for name in names]
    (raw / "train.jsonl").write_text("\n".join(lines))
    write_shards(raw, tmp_path / "shards", max_bad_ratio=0, num_workers=1)
    for how, expected in (
        ("exact", {"duplicate": 1}),
        ("perceptual", {"duplicate": 1, "near_duplicate": 1}),
    ):
        report = deal(tmp_path / "shards", tmp_path / how, Deal(duplicates=how))
        assert report.dropped == expected
        assert report.samples == {"train": 4 - sum(expected.values())}
        assert report.examples["duplicate"] == ["train-000003 repeats train-000001"]


def test_every_cause_in_an_error_is_one_that_the_audit_explains():
    with pytest.raises(AssertionError):
        BadRowError("unheard_of", "")
