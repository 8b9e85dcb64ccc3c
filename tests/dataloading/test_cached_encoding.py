"""Rows are the same with the cache off, cold and warm; and what was kept is what is read."""

import io
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.energon import SkipSample

from tests.dataloading.conftest import SHELLS, Encoders
from tests.dataloading.test_loader import assert_same, conversation, take
from tests.tiny.rows import noise
from vlmcore.dataloading import cached_encoding as cached_encoding_module
from vlmcore.dataloading import task_encoder as task_encoder_module
from vlmcore.dataloading.cached_encoding import CachedEncoding
from vlmcore.dataloading.encode import ConversationEncoder
from vlmcore.dataloading.encoded_cache import EncodedCache
from vlmcore.dataloading.levels import from_levels, to_levels
from vlmcore.dataloading.loader import stage_loader, stage_task_encoder, stop_workers
from vlmcore.dataloading.media import MediaLimits
from vlmcore.dataloading.samples import ConversationSample, PackedRow
from vlmcore.dataloading.task_encoder import ConversationTaskEncoder
from vlmcore.recipe.train_stage import TrainStage

TinyModel = Callable[..., Path]
NAMES = [*SHELLS, "qwen3"]


def picture(size: tuple[int, int], form: str = "PNG") -> bytes:
    out = io.BytesIO()
    noise(size).save(out, form)
    return out.getvalue()


PICTURES = [picture((64, 40)), picture((30, 90)), picture((200, 150), "JPEG")]


def cache_of(folder: Path, hf_dir: Path, encoder: ConversationEncoder, **told: Any) -> Any:
    return CachedEncoding(
        EncodedCache(folder), hf_dir=hf_dir, media=encoder.media, text_settings=told
    )


def row(task_encoder: ConversationTaskEncoder, samples: list[ConversationSample]) -> PackedRow:
    kept = []
    for sample in samples:
        try:
            kept.append(task_encoder.postencode_sample(task_encoder.preencode_sample(sample)))
        except SkipSample:
            continue
    kept.append(task_encoder.preencode_sample(conversation("?", "the row's last")))
    return task_encoder.batch(kept)


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.glob("??/*") if path.is_file()]


class Reads:
    """Counts what is decoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for name in ("open_image", "frames_at", "probe_video", "image_size"):
            monkeypatch.setattr(
                task_encoder_module, name, self._counted(getattr(task_encoder_module, name))
            )

    def _counted(self, read: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            self.count += 1
            return read(*args)

        return counted


@pytest.mark.parametrize("truncation", ["delete", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_the_same_without_it_cold_and_warm(
    encoders: Encoders,
    tiny_model: TinyModel,
    video_file: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    truncation: Any,
) -> None:
    encoder = encoders(name)
    samples = [
        conversation("What?", "seven"),
        conversation("<image>?", "one", images=PICTURES[:1]),
        conversation("<image>and<image>?", "<image>three", images=PICTURES),
        conversation("<image>?", "torn", images=[PICTURES[0][:-2000]]),
        conversation("<image>?", "no image", images=[b"text"]),
        conversation("<image>?", "a very long answer " * 400, images=PICTURES[:1]),
        conversation("<image><video>?", "both", images=PICTURES[1:2], videos=[video_file]),
    ]
    reads = Reads(monkeypatch)

    def made(cache: CachedEncoding | None) -> PackedRow:
        return row(
            ConversationTaskEncoder(encoder, max_length=1500, truncation=truncation, cached=cache),
            samples,
        )

    expected = made(None)
    if name != "qwen3":
        assert expected.vision and expected.num_samples >= 4
    cold = made(cache_of(tmp_path, tiny_model(name), encoder))
    num_entries = len(entries(tmp_path))
    before = reads.count
    warm = made(cache_of(tmp_path, tiny_model(name), encoder))
    assert_same([cold, warm], [expected, expected])
    assert len(entries(tmp_path)) == num_entries
    # read again: two broken files, and for LLaVA an image beside a video, which it does not take
    assert reads.count - before == {"qwen3": 0, "llava": 3}.get(name, 2)


@pytest.mark.parametrize("name", SHELLS)
def test_tensors_are_kept_as_bytes(
    encoders: Encoders, tiny_model: TinyModel, tmp_path: Path, name: str
) -> None:
    """Else they take four times the room, which nothing but this would tell."""
    task_encoder = ConversationTaskEncoder(
        encoders(name), max_length=9000, cached=cache_of(tmp_path, tiny_model(name), encoders(name))
    )
    for images in (PICTURES, PICTURES[2:]):
        sample = conversation("<image>" * len(images), "7", images=images)
        task_encoder.postencode_sample(task_encoder.preencode_sample(sample))
    kept = [EncodedCache(tmp_path).get(one.parent.name + one.name) for one in entries(tmp_path)]
    pixels = [one["pixel_values"] for one in kept if one and "pixel_values" in one]
    assert [one.dtype for one in pixels] == [torch.uint8] * 2


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_levels_come_back_and_anything_else_is_refused(
    encoders: Encoders, data: st.DataObject
) -> None:
    media = encoders(data.draw(st.sampled_from(SHELLS))).media
    assert media is not None
    processor = media.processor.image_processor
    shape = data.draw(st.sampled_from([(4, 3 * 8), (2, 3, 4, 5), (2, 2, 3, 4, 5), (1, 3, 1, 1)]))
    seed = data.draw(st.integers(0, 2**32 - 1))
    levels = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))
    pixels = from_levels(levels, processor)
    found = to_levels(pixels, processor)
    assert found is not None and torch.equal(found, levels)
    pixels.view(-1)[seed % pixels.numel()] += data.draw(
        st.sampled_from([1e-3, float("nan"), float("inf"), -9.0, 9.0])
    )
    assert to_levels(pixels, processor) is None


def test_what_decides_the_encoding_decides_the_key(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each change makes new entries; the right number: text alone, or text and tensors."""
    hf_dir = tmp_path / "model"
    shutil.copytree(tiny_model("qwen3_vl"), hf_dir)
    folder = tmp_path / "encoded"
    sample = conversation("<image>?", "one", images=PICTURES[:1])

    def new_entries(
        given: ConversationSample = sample,
        max_length: int = 2000,
        truncation: Any = "delete",
        limits: MediaLimits | None = None,
        **told: Any,
    ) -> int:
        before = len(entries(folder))
        encoder = ConversationEncoder(hf_dir, task="sft", limits=limits)
        cache = cache_of(folder, hf_dir, encoder, **told)
        task_encoder = ConversationTaskEncoder(
            encoder, max_length=max_length, truncation=truncation, cached=cache
        )
        task_encoder.postencode_sample(task_encoder.preencode_sample(given))
        return len(entries(folder)) - before

    assert new_entries() == 2
    assert new_entries() == 0
    assert new_entries(max_length=1000) == 0  # nothing is cut, so the length decides nothing
    assert new_entries(max_length=1000, truncation="right") == 1
    assert new_entries(max_length=1001, truncation="right") == 1
    assert new_entries(task="pt") == 1
    assert new_entries(limits=MediaLimits(min_pixels=64 * 64)) == 2
    assert new_entries(conversation("<image>!", "one", images=PICTURES[:1])) == 1
    assert new_entries(conversation("<image>?", "one", images=PICTURES[1:2])) == 2
    weighed = conversation("<image>?", "one", images=PICTURES[:1])
    weighed.messages[1]["loss_scale"] = 0.5
    assert new_entries(weighed) == 1
    template = hf_dir / "chat_template.jinja"
    template.write_text(template.read_text() + "{# changed #}")
    assert new_entries() == 1
    moved = tmp_path / "moved"
    hf_dir = hf_dir.rename(moved)
    assert new_entries() == 0
    dataloading, families = cached_encoding_module._CODE
    shutil.copytree(dataloading, tmp_path / "changed")
    monkeypatch.setattr(cached_encoding_module, "_CODE", (tmp_path / "changed", families))
    assert new_entries() == 0
    with (tmp_path / "changed" / "media.py").open("a") as source:
        source.write("# changed\n")
    assert new_entries() == 2


def test_a_stage_reads_what_another_kept_and_restores_alike(
    tiny_model: TinyModel, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off, cold, warm and after damage; in a worker; the position taken in the middle."""
    cache_dir = tmp_path / "encoded"
    stage = TrainStage(
        name="align", data=("numbers",), train_iters=1, max_length=160, packing_buffer_size=16,
        dataloader_num_workers=1,
    )  # fmt: skip
    reads = Reads(monkeypatch)

    def rows(folder: Path | None, state: Any = None, **changed: Any) -> tuple[list, Any, list]:
        changed_stage = stage.model_copy(update=changed)
        loader = stage_loader(
            changed_stage,
            {tiny_dataset: 1.0},
            stage_task_encoder(changed_stage, tiny_model("qwen3_vl"), cache_dir=folder),
            data_parallel_rank=0,
            data_parallel_size=1,
            blend_file=tmp_path / "blend.yaml",
        )
        if state is not None:
            loader.restore_state_rank(state)
        rows = iter(loader)
        first = take(rows, 7)
        state = loader.save_state_rank()
        then = take(rows, 7)
        stop_workers(loader)
        return first, state, then

    first, state, then = rows(None)
    cold = rows(cache_dir)
    assert_same(cold[0] + cold[2], first + then)
    assert_same(rows(None, cold[1])[0], then)
    assert_same(rows(cache_dir, state)[0], then)
    in_process = {"dataloader_num_workers": 0}
    assert reads.count == 0  # so far a worker has read
    kept = rows(cache_dir, **in_process)
    assert_same(kept[0] + kept[2], first + then)
    assert reads.count == 0
    for index, path in enumerate(entries(cache_dir)):
        path.write_bytes(path.read_bytes()[: -1 - index])
    mended = rows(cache_dir, **in_process)
    assert_same(mended[0] + mended[2], first + then)
    assert reads.count > 0


def test_the_field_is_no_part_of_the_key() -> None:
    stage = TrainStage(name="align", data=("numbers",), train_iters=1)
    kept = stage.model_copy(update={"cache_encoded_samples": True})
    assert stage.content_params() == kept.content_params()


def test_damage_is_said_once_and_training_goes_on(
    encoders: Encoders, tiny_model: TinyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = encoders("qwen3_vl")
    samples = [conversation("<image>?", str(i), images=PICTURES[:1]) for i in range(4)]

    def made() -> PackedRow:
        cache = cache_of(tmp_path, tiny_model("qwen3_vl"), encoder)
        return row(ConversationTaskEncoder(encoder, max_length=2000, cached=cache), samples)

    expected = made()
    for path in entries(tmp_path):
        path.write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert_same([made(), made()], [expected, expected])
    assert len(caplog.messages) == 1 and "made anew" in caplog.messages[0]
