"""The loader on a real energon dataset of handwritten numbers, one to four tokens of image each."""

import io
import json
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.energon import SkipSample

from tests.dataloading.conftest import SHELLS, Encoders
from tests.tiny.datasets import numbers_dataset
from tests.tiny.rows import noise
from vlmcore.dataloading import task_encoder as task_encoder_module
from vlmcore.dataloading.encode import IGNORED, ConversationEncoder, dummy_vision_inputs
from vlmcore.dataloading.loader import (
    stage_loader,
    stage_task_encoder,
    stop_workers,
    train_loader,
)
from vlmcore.dataloading.samples import ConversationSample, PackedRow
from vlmcore.dataloading.task_encoder import ConversationTaskEncoder
from vlmcore.errors import DataError
from vlmcore.recipe.train_stage import TrainStage

MAX_LENGTH = 160
Loader = Callable[..., Any]


@pytest.fixture(scope="module")
def encoder(encoders: Encoders) -> ConversationEncoder:
    return encoders("qwen3_vl")


@pytest.fixture
def loader(encoder: ConversationEncoder, tiny_dataset: Path, tmp_path: Path) -> Iterator[Loader]:
    built = []

    def build(
        dataset: Path = tiny_dataset,
        *,
        max_length: int = MAX_LENGTH,
        multiple: int = 1,
        copies: int = 1,
        **changed: Any,
    ) -> Any:
        options = {
            "micro_batch_size": 1,
            "packing_buffer_size": 16,
            "seed": 5,
            "data_parallel_rank": 0,
            "data_parallel_size": 1,
            "blend_file": tmp_path / "blend.yaml",
        }
        task_encoder = ConversationTaskEncoder(encoder, max_length=max_length, multiple=multiple)
        datasets = {dataset: 1.0}
        for index in range(1, copies):  # the same one under another name
            link = tmp_path / f"copy{index}"
            if not link.exists():
                link.symlink_to(dataset)
            datasets[link] = 1.0
        built.append(train_loader(datasets, task_encoder, **(options | changed)))
        return built[-1]

    yield build
    for one in built:
        stop_workers(one)


def take(loader: Any, count: int) -> list[PackedRow]:
    return list(islice(loader, count))


def assert_same(found: list[PackedRow], expected: list[PackedRow]) -> None:
    for a, b in zip(found, expected, strict=True):
        for name in ("input_ids", "labels", "loss_scale", "position_ids", "cu_seqlens"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert a.vision.keys() == b.vision.keys()
        assert all(torch.equal(a.vision[name], b.vision[name]) for name in a.vision)
        assert (a.num_samples, a.dropped) == (b.num_samples, b.dropped)


def lengths(row: PackedRow) -> list[int]:
    return row.cu_seqlens.diff().tolist()


def test_a_row_holds_whole_samples(loader: Loader, encoder: ConversationEncoder) -> None:
    rows = take(loader(), 12)
    assert max(row.num_samples for row in rows) > 3
    for row in rows:
        assert sum(lengths(row)) == len(row.input_ids) <= MAX_LENGTH
        grids = row.vision["image_grid_thw"]
        assert len(lengths(row)) == row.num_samples == len(grids)
        assert row.position_ids.shape == (3, len(row.input_ids))
        starts = row.cu_seqlens[:-1].long()
        assert not row.position_ids[:, starts].any()
        assert row.labels[row.cu_seqlens[1:].long() - 1].tolist() == [IGNORED] * row.num_samples
        image = encoder.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        patches = len(row.vision["pixel_values"])
        assert int((row.input_ids == image).sum()) * 4 == patches == int(grids.prod(1).sum())


def test_rows_are_padded_to_a_multiple(loader: Loader) -> None:
    plain, padded = take(loader(), 8), take(loader(multiple=8), 8)
    assert any(len(row.input_ids) % 8 for row in plain)
    for row, longer in zip(plain, padded, strict=True):
        extra = -len(row.input_ids) % 8
        assert len(longer.input_ids) == len(row.input_ids) + extra == sum(lengths(longer))
        assert longer.labels[len(row.input_ids) :].tolist() == [IGNORED] * extra
        assert not longer.loss_scale[len(row.input_ids) :].any()
        assert longer.num_samples == row.num_samples


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="packed"),
        pytest.param({"copies": 2}, id="a blend"),
        pytest.param({"max_length": 22}, id="some too long"),
        pytest.param({"packing_buffer_size": None, "micro_batch_size": 3}, id="unpacked"),
        pytest.param({"num_workers": 1, "max_length": 22}, id="a worker"),
        pytest.param({"num_workers": 2}, id="two workers"),
    ],
)
def test_a_restored_loader_gives_the_same_next_rows(loader: Loader, options: dict) -> None:
    first = loader(**options)
    rows = iter(first)
    take(rows, 7)
    state = first.save_state_rank()
    expected = take(rows, 25)
    again = loader(**options)
    again.restore_state_rank(state)
    assert_same(take(again, 25), expected)
    assert any(row.num_dropped for row in expected) == ("max_length" in options)


def test_one_worker_gives_the_rows_of_none(loader: Loader) -> None:
    assert_same(take(loader(num_workers=1), 20), take(loader(), 20))


def test_workers_share_the_samples_and_end_at_once(loader: Loader) -> None:
    shared = loader(num_workers=2, packing_buffer_size=None)
    rows = take(shared, 400)  # of one worker and the other in turn
    first, second = keys(rows[::2]), keys(rows[1::2])
    assert not first & second
    assert len(first | second) == 60
    workers = list(shared._iterator._workers)
    began = time.monotonic()
    stop_workers(shared)
    assert time.monotonic() - began < 4  # a worker that is not told is waited for 5 s
    assert not any(worker.is_alive() for worker in workers)


def test_the_seed_decides_the_order(loader: Loader) -> None:
    expected = take(loader(), 6)
    assert_same(take(loader(), 6), expected)
    other = take(loader(seed=6), 6)
    assert any(
        a.input_ids.tolist() != b.input_ids.tolist() for a, b in zip(other, expected, strict=True)
    )


def keys(rows: Iterator[PackedRow] | list[PackedRow]) -> set[str]:
    return {row.__key__ for row in rows}


def test_data_parallel_ranks_read_different_samples(loader: Loader) -> None:
    alone = {"packing_buffer_size": None, "data_parallel_size": 2}
    first, second = (keys(take(loader(data_parallel_rank=rank, **alone), 150)) for rank in (0, 1))
    assert not first & second
    assert len(first | second) == 60


def test_samples_that_are_too_long_are_dropped_and_counted(
    loader: Loader, encoder: ConversationEncoder
) -> None:
    rows = take(loader(packing_buffer_size=None), 200)
    sizes = {row.__key__: len(row.input_ids) for row in rows}
    limit = sorted(sizes.values())[len(sizes) // 2]
    short = {key for key, size in sizes.items() if size <= limit}
    assert short < set(sizes)
    found = take(loader(packing_buffer_size=None, max_length=limit), 200)
    assert keys(found) == short
    assert {cause for row in found for cause in row.dropped} == {"too_long"}
    dropped = sum(row.num_dropped for row in found)
    expected = len(found) * (len(sizes) - len(short)) / len(short)
    assert 0.5 * expected < dropped < 2 * expected


def conversation(*contents: str, key: str = "a", **media: Any) -> ConversationSample:
    turns = [
        {"role": role, "content": content}
        for role, content in zip(["user", "assistant"], contents, strict=True)
    ]
    return ConversationSample(
        __key__=key, __restore_key__=(), messages=turns, **({"images": []} | media)
    )


def png(size: tuple[int, int]) -> bytes:
    out = io.BytesIO()
    noise(size).save(out, "PNG")
    return out.getvalue()


def test_a_dropped_sample_is_counted_once(encoder: ConversationEncoder) -> None:
    task_encoder = ConversationTaskEncoder(encoder, max_length=40)

    def sample(answer: str) -> ConversationSample:
        return conversation("<image>Read.", answer, images=[png((64, 32))])

    with pytest.raises(SkipSample):
        task_encoder.preencode_sample(sample("a very long answer " * 9))
    short = task_encoder.postencode_sample(task_encoder.preencode_sample(sample("7")))
    assert [task_encoder.batch([short]).num_dropped for _ in range(2)] == [1, 0]


@pytest.mark.parametrize("name", ["qwen3_vl", "llava", "qwen3"])
def test_bad_samples_are_skipped_and_counted_by_cause(encoders: Encoders, name: str) -> None:
    encoder = encoders(name)
    task_encoder = ConversationTaskEncoder(encoder, max_length=200)
    token = "<|image_pad|>"
    bad = [
        ("unsupported_media", conversation("<video>?", "7", videos=[b""])),
        ("tag_mismatch", conversation("<image>?", "7")),
        ("too_long", conversation("?", "7" * 900)),
        ("no_loss", conversation("?", "7") if name == "" else None),
    ]
    if name == "qwen3_vl":
        bad[0] = ("literal_placeholder", conversation("?", f"the {token} token"))
    if name != "qwen3":
        bad.append(("bad_media", conversation("<image>?", "7", images=[b"no image"])))
    expected: dict[str, int] = {}
    for cause, sample in bad:
        if sample is None:
            sample = conversation("?", "7")
            sample.messages[1]["loss_scale"] = 0.0
        expected[cause] = expected.get(cause, 0) + 1
        with pytest.raises(SkipSample):
            task_encoder.preencode_sample(sample)
    good = task_encoder.preencode_sample(conversation("?", "7"))
    assert task_encoder.batch([good]).dropped == expected


def test_an_image_whose_pixels_do_not_decode_is_skipped(encoder: ConversationEncoder) -> None:
    task_encoder = ConversationTaskEncoder(encoder, max_length=200)
    torn = png((64, 64))[:-4000]
    sample = task_encoder.preencode_sample(conversation("<image>?", "7", images=[torn]))
    with pytest.raises(SkipSample):
        task_encoder.postencode_sample(sample)
    good = task_encoder.preencode_sample(conversation("?", "7"))
    assert task_encoder.batch([good]).dropped == {"bad_media": 1}


def test_a_dataset_that_does_not_fit_stops_and_says_why(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_encoder_module, "MAX_SKIPS_IN_A_ROW", 40)
    with pytest.raises(DataError, match="40 samples in a row cannot be trained on: 40 too_long"):
        take(loader(max_length=5), 1)


def test_a_process_that_would_read_nothing_is_refused(loader: Loader, tmp_path: Path) -> None:
    few = numbers_dataset(tmp_path / "few", train=4)
    for rank in (0, 1):
        ranks = {"data_parallel_size": 2, "data_parallel_rank": rank}
        assert take(loader(few, **ranks, num_workers=2), 1)
    words = r"few.*: fewer samples than processes that read them \(2 data parallel ranks × 3\)"
    with pytest.raises(DataError, match=words):
        for rank in (0, 1):  # one of them has enough
            loader(few, data_parallel_size=2, data_parallel_rank=rank, num_workers=3)


def test_a_dataset_that_holds_everything_out_is_refused(loader: Loader, tmp_path: Path) -> None:
    folder = numbers_dataset(tmp_path / "none", train=4)
    split = folder / ".nv-meta" / "split.yaml"
    split.write_text("split_parts: {train: [], val: [train-000000.tar], test: []}\nexclude: []\n")
    with pytest.raises(DataError, match="none.*: no sample is in the train split"):
        loader(folder)


def test_a_longer_sample_may_be_cut_instead(encoders: Encoders) -> None:
    for name in ("qwen3_vl", "internvl", "llava_onevision"):
        encoder = encoders(name)
        task_encoder = ConversationTaskEncoder(encoder, max_length=90, truncation="right")
        sample = conversation("Hi", "a long answer " * 20 + "<image>", images=[png((64, 64))])
        row = task_encoder.batch(
            [task_encoder.postencode_sample(task_encoder.preencode_sample(sample))]
        )
        assert len(row.input_ids) == 90
        assert not row.vision
        assert row.loss_scale.any()
    several = conversation("<image>", "x " * 99 + "<image>", images=[png((64, 64)), png((60, 60))])
    with pytest.raises(SkipSample):  # the one that is left would be tiled, which the cut forgot
        task_encoder.preencode_sample(several)


@pytest.mark.parametrize("name", SHELLS)
def test_a_video_and_images_reach_the_row(encoders: Encoders, name: str, video_file: bytes) -> None:
    task_encoder = ConversationTaskEncoder(encoders(name), max_length=4000)
    files = {"images": [png((64, 40)), png((30, 90))]}
    tags = "<image>and<image>"
    if name != "llava":
        files["videos"] = [video_file]
        tags = "<image><video><image>"
    sample = conversation(tags, "7", **files)
    row = task_encoder.batch(
        [task_encoder.postencode_sample(task_encoder.preencode_sample(sample))]
    )
    assert row.vision["pixel_values"].ndim in (2, 4)
    if name not in ("llava", "internvl"):
        assert len(row.vision["pixel_values_videos"])


def test_members_of_a_shard_become_a_conversation() -> None:
    crude = {
        "__key__": "train-1",
        "__restore_key__": (),
        "__subflavors__": None,
        "json": json.dumps(
            {"messages": [], "images": ["1.png", "0.png"], "videos": ["v0.mp4"]}
        ).encode(),
        "0.png": b"first",
        "1.png": b"second",
        "v0.mp4": b"clip",
    }
    sample = task_encoder_module.cook_conversation(crude)
    assert (sample.images, sample.videos) == ([b"second", b"first"], [b"clip"])


def test_a_stage_says_how_its_samples_are_read(
    tiny_model: Callable[..., Path], tiny_dataset: Path, tmp_path: Path
) -> None:
    def rows(**fields: Any) -> list[PackedRow]:
        stage = TrainStage(
            name="align",
            data=("numbers",),
            train_iters=1,
            max_length=160,
            packing_buffer_size=16,
            dataloader_num_workers=0,
            **fields,
        )
        built = stage_loader(
            stage,
            {tiny_dataset: 1.0},
            stage_task_encoder(stage, tiny_model("qwen3_vl")),
            data_parallel_rank=0,
            data_parallel_size=1,
            blend_file=tmp_path / "blend.yaml",
        )
        return take(built, 8)

    plain, enlarged = rows(), rows(min_pixels=100 * 32 * 32, truncation_strategy="right")
    assert all(len(row.input_ids) <= 160 for row in enlarged)
    image_tokens = [int(row.vision["image_grid_thw"].prod(1).min()) // 4 for row in enlarged]
    assert min(image_tokens) >= 100 > int(plain[0].vision["image_grid_thw"].prod(1).max()) // 4
    trained = [sum(int((row.loss_scale > 0).sum()) for row in found) for found in
               (plain, rows(loss_scale="all"), rows(task="pt"))]  # fmt: skip
    assert trained[0] < min(trained[1:])
    assert len(plain[0].input_ids) != len(rows(packing=False)[0].input_ids)


def test_a_text_model_has_no_dummy_image(encoders: Encoders) -> None:
    assert dummy_vision_inputs(encoders("qwen3")) == {}
    assert set(dummy_vision_inputs(encoders("qwen3_vl"))) == {"pixel_values", "image_grid_thw"}
