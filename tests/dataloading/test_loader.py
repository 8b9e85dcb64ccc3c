"""The loader on a real energon dataset of handwritten numbers, one to four tokens of image each."""

import io
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.energon import SkipSample

from tests.tiny.rows import noise
from vlmcore.dataloading.encode import IGNORED, ConversationEncoder
from vlmcore.dataloading.loader import train_loader
from vlmcore.dataloading.samples import ConversationSample, PackedRow
from vlmcore.dataloading.task_encoder import ConversationTaskEncoder

MAX_LENGTH = 160
Loader = Callable[..., Any]


@pytest.fixture(scope="module")
def encoder(tiny_model: Callable[..., Path]) -> ConversationEncoder:
    return ConversationEncoder(tiny_model("qwen3_vl"), task="sft")


@pytest.fixture
def loader(encoder: ConversationEncoder, tiny_dataset: Path, tmp_path: Path) -> Loader:
    def build(
        *, max_length: int = MAX_LENGTH, multiple: int = 1, copies: int = 1, **changed: Any
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
        datasets = {tiny_dataset: 1.0}
        for index in range(1, copies):  # the same one under another name
            link = tmp_path / f"copy{index}"
            if not link.exists():
                link.symlink_to(tiny_dataset)
            datasets[link] = 1.0
        return train_loader(datasets, task_encoder, **(options | changed))

    return build


def take(loader: Any, count: int) -> list[PackedRow]:
    return list(islice(loader, count))


def assert_same(found: list[PackedRow], expected: list[PackedRow]) -> None:
    for a, b in zip(found, expected, strict=True):
        for name in ("input_ids", "labels", "position_ids", "cu_seqlens", "image_grid_thw"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert torch.equal(a.pixel_values, b.pixel_values)
        assert (a.num_samples, a.num_dropped) == (b.num_samples, b.num_dropped)


def lengths(row: PackedRow) -> list[int]:
    return row.cu_seqlens.diff().tolist()


def test_a_row_holds_whole_samples(loader: Loader, encoder: ConversationEncoder) -> None:
    rows = take(loader(), 12)
    assert max(row.num_samples for row in rows) > 3
    for row in rows:
        assert sum(lengths(row)) == len(row.input_ids) <= MAX_LENGTH
        assert len(lengths(row)) == row.num_samples == len(row.image_grid_thw)
        assert row.position_ids.shape == (3, len(row.input_ids))
        starts = row.cu_seqlens[:-1].long()
        assert not row.position_ids[:, starts].any()
        assert row.labels[row.cu_seqlens[1:].long() - 1].tolist() == [IGNORED] * row.num_samples
        placeholders = int((row.input_ids == encoder.image_token_id).sum())
        assert placeholders * 4 == len(row.pixel_values) == int(row.image_grid_thw.prod(1).sum())


def test_rows_are_padded_to_a_multiple(loader: Loader) -> None:
    plain, padded = take(loader(), 8), take(loader(multiple=8), 8)
    assert any(len(row.input_ids) % 8 for row in plain)
    for row, longer in zip(plain, padded, strict=True):
        extra = -len(row.input_ids) % 8
        assert len(longer.input_ids) == len(row.input_ids) + extra == sum(lengths(longer))
        assert longer.labels[len(row.input_ids) :].tolist() == [IGNORED] * extra
        assert longer.num_samples == row.num_samples


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="packed"),
        pytest.param({"copies": 2}, id="a blend"),
        pytest.param({"max_length": 22}, id="some too long"),
        pytest.param({"packing_buffer_size": None, "micro_batch_size": 3}, id="unpacked"),
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
    dropped = sum(row.num_dropped for row in found)
    expected = len(found) * (len(sizes) - len(short)) / len(short)
    assert 0.5 * expected < dropped < 2 * expected


def test_a_dropped_sample_is_counted_once(encoder: ConversationEncoder) -> None:
    task_encoder = ConversationTaskEncoder(encoder, max_length=40)

    def sample(answer: str) -> ConversationSample:
        image = io.BytesIO()
        noise((64, 32)).save(image, "PNG")
        turns = [
            {"role": "user", "content": "<image>Read."},
            {"role": "assistant", "content": answer},
        ]
        return ConversationSample(
            __key__=answer, __restore_key__=(), messages=turns, images=[image.getvalue()]
        )

    with pytest.raises(SkipSample):
        task_encoder.preencode_sample(sample("a very long answer " * 9))
    short = task_encoder.postencode_sample(task_encoder.preencode_sample(sample("7")))
    assert [task_encoder.batch([short]).num_dropped for _ in range(2)] == [1, 0]
