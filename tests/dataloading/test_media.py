"""Tokens and tensors of images and videos, beside what each family's processor says."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.dataloading.conftest import SHELLS, VIDEO, Encoders
from tests.tiny.rows import noise, row_of, token_sample, transformers_inputs
from vlmcore.dataloading.encode import ConversationEncoder
from vlmcore.dataloading.media import MediaLimits, MediaProcessor, Medium
from vlmcore.dataloading.task_encoder import ConversationTaskEncoder
from vlmcore.dataloading.video import VideoInfo, frames_at, probe_video
from vlmcore.errors import DataError

GRIDS = ["exaone4_5", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"]
FIXED = ["llava", "llava_onevision"]
sides = st.integers(1, 700)


def features(media: MediaProcessor, medium: Medium) -> int:
    return sum(medium.replacement.count(token) for token in media.placeholders.values())


@pytest.mark.parametrize("name", SHELLS)
def test_an_image_of_any_size_takes_the_processors_number_of_tokens(
    encoders: Encoders, name: str
) -> None:
    encoder = encoders(name)
    processor: Any = encoder.media.processor

    @settings(max_examples=25, deadline=None)
    @given(width=sides, height=sides, alone=st.booleans())
    def check(width: int, height: int, *, alone: bool) -> None:
        if max(width, height) > 200 * min(width, height):  # refused by Qwen's processors
            return
        images = [Image.new("RGB", (width, height))] * (1 if alone else 2)
        token = processor.image_token
        text = processor(text=[token * len(images)], images=[images], return_tensors="pt")
        foretold = encoder.media.image((width, height), alone=alone).replacement * len(images)
        expected = processor.tokenizer(foretold, add_special_tokens=False)["input_ids"]
        assert text["input_ids"][0].tolist() == expected

    check()


@pytest.fixture(scope="session")
def own_processor(tiny_model: Any) -> Any:
    """A family's processor as transformers loads it."""
    from transformers import AutoProcessor

    return lambda name: AutoProcessor.from_pretrained(tiny_model(name))


def expected_inputs(processor: Any, text: str, **given: Any) -> dict[str, torch.Tensor]:
    out = processor(text=[text], return_tensors="pt", **given)
    names = {"input_ids", "attention_mask", "mm_token_type_ids", "second_per_grid_ts"}
    found = {name: value for name, value in out.items() if name not in names}
    pixels = found.get("pixel_values")
    if pixels is not None and pixels.ndim == 5:  # no image of the sample is padded with tiles
        found["pixel_values"] = pixels.flatten(0, 1)
    return found


@pytest.mark.parametrize("sizes", [[(96, 64)], [(64, 64), (33, 210), (150, 40)]])
def test_the_tensors_of_images_are_the_processors(
    encoders: Encoders, own_processor: Any, shell: str, sizes: list
) -> None:
    media = encoders(shell).media
    images = [noise(size, seed=i) for i, size in enumerate(sizes)]
    outlines = [media.image(size, alone=len(sizes) == 1) for size in sizes]
    found = media.tensors(outlines, images)
    text = media.processor.image_token * len(sizes)
    expected = expected_inputs(own_processor(shell), text, images=[images])
    assert found.keys() == expected.keys()
    found = transformers_inputs(found)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("name", [name for name in SHELLS if name != "llava"])
@pytest.mark.parametrize("video_first", [True, False])
def test_the_tensors_of_a_video_beside_an_image_are_the_processors(
    encoders: Encoders, own_processor: Any, name: str, video_first: bool
) -> None:
    from transformers.video_utils import VideoMetadata

    media = encoders(name).media
    info = VideoInfo(100, 70, fps=10.0, num_frames=37)
    video, image = media.video(info), media.image((96, 64), alone=True)
    pixels = np.random.default_rng(0).integers(0, 256, (len(video.frames), 70, 100, 3), np.uint8)
    picture = noise((96, 64))
    both: list = [(video, pixels), (image, picture)]
    tokens = [media.placeholders["video"], media.placeholders["image"]]
    if not video_first:
        both, tokens = both[::-1], tokens[::-1]
    found = media.tensors(*map(list, zip(*both, strict=True)))
    metadata = VideoMetadata(
        total_num_frames=37, fps=10.0, duration=3.7, frames_indices=list(video.frames)
    )
    expected = expected_inputs(
        own_processor(name),
        " and ".join(tokens),
        images=[[picture]],
        videos=[torch.from_numpy(pixels).permute(0, 3, 1, 2)],
        video_metadata=[metadata],
        do_sample_frames=False,
    )
    assert found.keys() == expected.keys()
    found = transformers_inputs(found)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def test_the_tensors_of_a_row_are_those_of_its_samples(encoders: Encoders, shell: str) -> None:
    """Made for all at once; images of one size in one go where they are small."""
    task_encoder = ConversationTaskEncoder(encoders(shell), max_length=10_000)
    media = task_encoder.encoder.media
    each = [[(96, 64)], [], [(96, 64), (33, 210), (64, 64)], [(96, 64)], [(64, 64)], [(700, 650)]]
    for sizes in (each[:-1], each):
        samples, expected = [], []
        for i, some in enumerate(sizes):
            outlines = tuple(media.image(size, alone=len(some) == 1) for size in some)
            pictures = [noise(size, seed=10 * i + j) for j, size in enumerate(some)]
            sample = token_sample(task_encoder.encoder, "Look.", "Yes.", images=[])
            sample.media, sample.files = outlines, [png(picture) for picture in pictures]
            samples.append(task_encoder.postencode_sample(sample))
            expected.append(media.tensors(outlines, pictures))
        row = task_encoder.pack_selected_samples(samples).vision
        assert row.keys() == {name for one in expected for name in one}
        for name, found in row.items():
            assert torch.equal(found, torch.cat([one[name] for one in expected if one])), name


def test_a_videos_steps_last_as_long_as_the_processor_says(encoders: Encoders) -> None:
    from transformers.video_utils import VideoMetadata

    media = encoders("qwen2_5_vl").media
    video = media.video(VideoInfo(100, 70, fps=10.0, num_frames=37))
    out = media.processor(
        text=[media.placeholders["video"]],
        videos=[torch.zeros(len(video.frames), 3, 70, 100, dtype=torch.uint8)],
        video_metadata=[
            VideoMetadata(total_num_frames=37, fps=10.0, frames_indices=list(video.frames))
        ],
        do_sample_frames=False,
    )
    assert video.seconds_per_step == out["second_per_grid_ts"][0]
    assert list(video.grid) == out["video_grid_thw"][0].tolist()


def test_qwen3_says_the_time_before_each_step_of_a_video(encoders: Encoders) -> None:
    media = encoders("qwen3_vl").media
    video = media.video(VideoInfo(96, 64, fps=10.0, num_frames=37))
    assert video.frames == (0, 6, 12, 18, 24, 30, 36)
    stamps = [part.partition(">")[0] for part in video.replacement.split("<") if "seconds" in part]
    assert stamps == ["0.3 seconds", "1.5 seconds", "2.7 seconds", "3.6 seconds"]
    assert len(stamps) == video.grid[0]


@pytest.mark.parametrize("num_frames", [1, 2, 3, 5, 400])
@pytest.mark.parametrize("name", [name for name in SHELLS if name != "llava"])
def test_videos_of_any_length_stay_within_the_frames_allowed(
    tiny_model: Any, name: str, num_frames: int
) -> None:
    media = MediaProcessor(tiny_model(name), MediaLimits(fps=4.0, fps_max_frames=6))
    video = media.video(VideoInfo(40, 50, fps=8.0, num_frames=num_frames))
    assert len(video.frames) <= 6
    assert list(video.frames) == sorted(video.frames)
    assert video.frames[-1] < max(2, num_frames)
    if num_frames == 400:
        assert len(video.frames) == 6
    pixels = np.zeros((len(video.frames), 50, 40, 3), np.uint8)
    assert media.tensors([video], [pixels])


@pytest.mark.parametrize("name", GRIDS)
def test_limits_bound_the_pixels(tiny_model: Any, name: str) -> None:
    unit = MediaProcessor(tiny_model(name), MediaLimits()).processor.image_processor.patch_size ** 2
    area = 100 * unit
    limits = MediaLimits(max_pixels=area, min_pixels=area // 2, video_max_pixels=area // 4)
    media = MediaProcessor(tiny_model(name), limits)
    large, small = (media.image(size, alone=True) for size in ((900, 700), (20, 30)))
    assert unit * np.prod(large.grid) <= area
    assert unit * np.prod(small.grid) >= area // 2
    own = MediaProcessor(tiny_model(name), MediaLimits())
    for num_frames in (9, 33):
        info = VideoInfo(640, 480, fps=4.0, num_frames=num_frames)
        _, height, width = media.video(info).grid
        assert unit * height * width <= area // 4
        assert np.prod(own.video(info).grid) > np.prod(media.video(info).grid)


def test_limits_bound_the_tiles(tiny_model: Any) -> None:
    def tiles(size: tuple[int, int], **limits: int) -> int:
        media = MediaProcessor(tiny_model("internvl"), MediaLimits(**limits))
        return len(media.tensors([media.image(size, alone=True)], [noise(size)])["pixel_values"])

    tile = 56 * 56
    assert tiles((300, 200)) == 7  # six and the whole
    assert tiles((300, 200), max_pixels=3 * tile) == 3  # two and the whole
    assert tiles((300, 200), max_pixels=tile) == 1
    assert tiles((56, 56), min_pixels=2 * tile) > tiles((56, 56)) == 1


@pytest.mark.parametrize("name", FIXED)
def test_a_limit_that_a_family_cannot_keep_is_refused(tiny_model: Any, name: str) -> None:
    with pytest.raises(DataError, match="max_pixels cannot be kept; leave it empty"):
        MediaProcessor(tiny_model(name), MediaLimits(max_pixels=1000))


def test_frames_are_those_at_the_times(video_file: bytes) -> None:
    info = probe_video(video_file)
    assert (info.width, info.height) == VIDEO["size"]
    assert (info.fps, info.num_frames) == (VIDEO["fps"], VIDEO["num_frames"])
    frames = frames_at(video_file, [0.0, 0.55, 0.6, 2.2, 2.3, 9.0])
    levels = frames.mean(axis=(1, 2, 3)) / 10
    assert levels.round().tolist() == [0, 6, 6, 22, 22, 22]  # the codec is lossy


def test_the_smallest_image_is_one_that_the_model_can_see(
    encoders: Encoders, tiny_model: Any, shell: str
) -> None:
    from transformers import AutoConfig

    from vlmcore.models.vision import build_vision_model, placeholders, see

    encoder: ConversationEncoder = encoders(shell)
    config = AutoConfig.from_pretrained(tiny_model(shell))
    model = build_vision_model(config, encoder.family, dtype=torch.float32)
    tokens = placeholders(tiny_model(shell), encoder.family, config)
    (seen,) = see(model, encoder.media.smallest(), tokens, dtype=torch.float32)
    assert len(seen.embedded) == features(encoder.media, encoder.media.image((8, 8), alone=True))


def test_features_of_a_row_are_those_of_its_samples(
    encoders: Encoders, tiny_model: Any, shell: str
) -> None:
    """One and several images a sample; a family may treat them differently."""
    import transformers

    from vlmcore.models.vision import placeholders, see

    encoder = encoders(shell)
    samples = [
        token_sample(encoder, "Read.", "7", images=[(96, 64)]),
        token_sample(encoder, "Hi", "there", images=[]),
        token_sample(encoder, "Compare.", "No.", images=[(64, 64), (128, 32), (20, 90)]),
        token_sample(encoder, "Look.", "Yes.", images=[(30, 170)]),
    ]
    whole_model = getattr(transformers, encoder.family.architecture)
    model = whole_model.from_pretrained(tiny_model(shell)).model
    tokens = placeholders(tiny_model(shell), encoder.family, model.config)
    with torch.no_grad():
        row = row_of(samples)
        (whole,) = see(model, transformers_inputs(row.vision), tokens, dtype=torch.float32)
        parts = [
            see(model, transformers_inputs(sample.vision), tokens, dtype=torch.float32)
            for sample in samples
            if sample.vision
        ]
    expected = torch.cat([part[0].embedded for part in parts])
    assert int((row.input_ids == tokens.image).sum()) == len(expected)
    # matrix products over more rows add up in another order
    torch.testing.assert_close(whole.embedded, expected, atol=1e-5, rtol=1e-5)
