import json
import sqlite3
from itertools import islice

import pytest
from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    Sample,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_loader,
    get_train_dataset,
    get_val_dataset,
    stateless,
)

from data_prep.energon import prepare
from data_prep.shards import write_shards
from data_prep.sources import fetch
from vlmcore.dataloading.loader import train_loader
from vlmcore.errors import DataError


@edataclass
class RawConversation(Sample):
    """A crude sample as it came: the conversation, and the bytes of its media."""

    messages: list[dict]
    images: list[bytes]
    videos: list[bytes]


@stateless
def cook(crude):
    conversation = json.loads(crude["json"])
    return RawConversation(
        **basic_sample_keys(crude),
        messages=conversation["messages"],
        images=[crude[name] for name in conversation["images"]],
        videos=[crude[name] for name in conversation.get("videos", [])],
    )


class RawEncoder(DefaultTaskEncoder):
    """Hands samples on untouched."""

    decoder = None
    cookers = [Cooker(cook)]

    def __init__(self):
        super().__init__(raw_batch_type=list)


class OneByOne(RawEncoder):
    """As a trainer that takes batches of one."""

    def batch(self, samples):
        return samples[0]


def read_split(dataset, split, *, rank=0, world_size=1):
    worker_config = WorkerConfig(rank=rank, world_size=world_size, num_workers=0)
    loaded = get_val_dataset(
        dataset,
        split_part=split,
        worker_config=worker_config,
        batch_size=None,
        task_encoder=RawEncoder(),
    )
    return list(get_loader(loaded))


@pytest.fixture(scope="module")
def prepared(numbers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    write_shards(numbers, folder / "shards", max_bad_ratio=0, num_workers=1)
    prepare(folder / "shards", folder / "energon")
    return folder / "energon"


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_energon_reads_every_row_of_a_split_with_its_very_image_bytes(prepared, numbers, split):
    rows = [json.loads(line) for line in (numbers / f"{split}.jsonl").read_text().splitlines()]
    samples = {sample.__key__: sample for sample in read_split(prepared, split)}
    assert list(samples) == [row["id"] for row in rows]
    for row in rows:
        sample = samples[row["id"]]
        assert sample.messages == row["messages"]
        assert sample.images == [(numbers / name).read_bytes() for name in row["images"]]


def test_the_training_loader_reads_each_sample_once_an_epoch(prepared):
    loaded = get_train_dataset(
        prepared,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=None,
        shuffle_buffer_size=16,
        max_samples_per_sequence=8,
        repeat=False,
        task_encoder=RawEncoder(),
    )
    keys = [sample.__key__ for sample in get_loader(loaded)]
    assert sorted(keys) == [f"train-{number:06d}" for number in range(1, 41)]
    assert keys != sorted(keys)


def test_ranks_share_the_samples_of_a_single_shard(prepared):
    keys = [
        [sample.__key__ for sample in read_split(prepared, "train", rank=rank, world_size=3)]
        for rank in range(3)
    ]
    assert [len(mine) for mine in keys] == [14, 13, 13]
    assert len({key for mine in keys for key in mine}) == 40


def test_text_alone_is_read_like_the_rest(tmp_path):
    fetch("builtin:written_numbers", tmp_path / "raw", options={"train": 9, "val": 0}, seed=0)
    write_shards(tmp_path / "raw", tmp_path / "shards", max_bad_ratio=0, num_workers=1)
    prepare(tmp_path / "shards", tmp_path / "energon")
    samples = read_split(tmp_path / "energon", "train")
    assert len(samples) == 9
    assert all(sample.images == [] and len(sample.messages) == 2 for sample in samples)


def test_several_images_come_back_in_the_order_of_their_tags(make_raw, row, tmp_path):
    names = [f"images/{'ab'[n % 2]}.{['png', 'jpg'][n % 2]}" for n in range(12)]
    raw = make_raw(train=[row("<image>" * 12, images=names)])
    write_shards(raw, tmp_path / "shards", max_bad_ratio=0, num_workers=1)
    prepare(tmp_path / "shards", tmp_path / "energon")
    (sample,) = read_split(tmp_path / "energon", "train")
    assert sample.images == [(raw / name).read_bytes() for name in names]


def test_preparing_twice_gives_the_same_bytes_and_links_the_shards(numbers, tmp_path, tree_digest):
    write_shards(
        numbers, tmp_path / "shards", max_bad_ratio=0, num_workers=1, max_samples_per_shard=9
    )
    for name in ("one", "two"):
        prepare(tmp_path / "shards", tmp_path / name)
    assert tree_digest(tmp_path / "one") == tree_digest(tmp_path / "two")
    assert (tmp_path / "one/val-000000.tar").samefile(tmp_path / "shards/val-000000.tar")


def test_nothing_reaches_standard_output(numbers, tmp_path, capsys):
    write_shards(numbers, tmp_path / "shards", max_bad_ratio=0, num_workers=1)
    prepare(tmp_path / "shards", tmp_path / "energon")
    assert capsys.readouterr().out == ""


def test_shards_without_a_report_are_not_taken_for_whole(numbers, tmp_path):
    write_shards(numbers, tmp_path / "shards", max_bad_ratio=0, num_workers=1)
    (tmp_path / "shards" / "report.json").unlink()
    with pytest.raises(DataError, match="not written to the end"):
        prepare(tmp_path / "shards", tmp_path / "energon")


def test_a_count_that_differs_from_what_was_written_is_an_error(numbers, tmp_path):
    write_shards(numbers, tmp_path / "shards", max_bad_ratio=0, num_workers=1)
    report = tmp_path / "shards" / "report.json"
    report.write_text(report.read_text().replace('"val": 6', '"val": 7'))
    with pytest.raises(DataError, match="finds 6 samples in split val, 7 were written"):
        prepare(tmp_path / "shards", tmp_path / "energon")


def test_sizes_and_durations_are_in_the_index(make_raw, row, make_video, tmp_path):
    clip = row("<video>What?", images=())
    raw = make_raw(train=[row(), {**clip, "videos": ["clip.mp4"]}])
    (raw / "clip.mp4").write_bytes(make_video(num_frames=30, fps=10))
    write_shards(raw, tmp_path / "shards", max_bad_ratio=0, num_workers=1)
    prepare(tmp_path / "shards", tmp_path / "energon")
    with sqlite3.connect(tmp_path / "energon" / ".nv-meta" / "index.sqlite") as index:
        found = dict(index.execute("SELECT entry_key, metadata_json FROM media_metadata"))
    image = json.loads(found["train-000001.0.png"])
    assert image == {"width": 40, "height": 30, "format": "PNG", "mode": "RGB"}
    video = json.loads(found["train-000002.v0.mp4"])
    assert (video["video_width"], video["video_height"], video["video_num_frames"]) == (64, 48, 30)
    assert video["video_duration"] == pytest.approx(3.0)


@pytest.mark.parametrize("sample_type", ["vqa", "captioning"])
def test_energons_own_sample_types_read_the_same_shards(sample_type, make_raw, row, tmp_path):
    raw = make_raw(train=[row(), row(images=["images/b.jpg"], answer="Another.")])
    write_shards(raw, tmp_path / "shards", max_bad_ratio=0, num_workers=1)
    prepare(tmp_path / "shards", tmp_path / "energon", sample_type=sample_type)
    loaded = get_val_dataset(
        tmp_path / "energon",
        split_part="train",
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=None,
        task_encoder=DefaultTaskEncoder(raw_batch_type=list),
    )
    first, second = get_loader(loaded)
    assert first.image.shape == (3, 30, 40)
    assert second.image.shape == (3, 48, 64)
    if sample_type == "vqa":
        assert (first.context, first.answers) == ("What is it?", ["A gradient."])
    else:
        assert [first.caption, second.caption] == ["A gradient.", "Another."]


def test_a_folder_of_shards_is_prepared_in_place_and_again(numbers, tmp_path, tree_digest):
    write_shards(numbers, tmp_path / "shards", max_bad_ratio=0, num_workers=1)
    prepare(tmp_path / "shards", tmp_path / "shards")
    first = tree_digest(tmp_path / "shards")
    prepare(tmp_path / "shards", tmp_path / "shards")
    assert tree_digest(tmp_path / "shards") == first
    assert len(read_split(tmp_path / "shards", "val")) == 6


def test_a_blend_draws_by_weight_whatever_the_sizes(make_raw, row, tmp_path):
    weights = {}
    for name, size, weight in (("small", 10, 3.0), ("large", 200, 1.0)):
        raw = tmp_path / f"{name}_raw"
        raw.mkdir()
        lines = [json.dumps(row(f"{name}?", images=())) for _ in range(size)]
        (raw / "train.jsonl").write_text("\n".join(lines))
        write_shards(raw, tmp_path / name / "shards", max_bad_ratio=0, num_workers=1)
        prepare(tmp_path / name / "shards", tmp_path / name / "energon")
        weights[tmp_path / name / "energon"] = weight
    loader = train_loader(
        weights,
        OneByOne(),
        micro_batch_size=1,
        packing_buffer_size=None,
        seed=0,
        data_parallel_rank=0,
        data_parallel_size=1,
        blend_file=tmp_path / "blend.yaml",
    )
    drawn = [one.messages[0]["content"] for one in islice(loader, 2000)]
    assert drawn.count("small?") / len(drawn) == pytest.approx(0.75, abs=0.04)
