"""What goes in comes out of energon unchanged: texts to the character, media to the byte."""

import base64
import io
import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.energon import prepare
from data_prep.shards import write_shards
from tests.data_prep.test_energon import read_split

# every character that JSON and UTF-8 can hold, but NUL, which no tokenizer takes
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60)
ANSWER = TEXT.filter(str.strip)


@st.composite
def pictures(draw):
    size = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    colour = draw(st.tuples(*[st.integers(0, 255)] * 3))
    out = io.BytesIO()
    kind = draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP"]))
    Image.new("RGB", size, colour).save(out, kind)
    return out.getvalue()


@st.composite
def conversations(draw):
    images = draw(st.lists(pictures(), max_size=4))
    lengths = draw(st.lists(st.integers(1, 5), max_size=2))  # frames of videos
    tags = draw(st.permutations(["<image>"] * len(images) + ["<video>"] * len(lengths)))
    turns = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
    question = draw(TEXT).replace("<", "‹") + "".join(tags)
    for _ in range(draw(st.integers(1, 3))):
        turns += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": draw(ANSWER).replace("<", "‹")},
        ]
        question = draw(TEXT).replace("<", "‹")
    return turns, images, lengths


@settings(
    max_examples=12, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(st.lists(conversations(), min_size=1, max_size=6), st.integers(1, 3))
def test_energon_gives_back_texts_and_bytes(tmp_path_factory, make_video, drawn, shard_size):
    rows = [
        (turns, images, [make_video(num_frames=length) for length in lengths])
        for turns, images, lengths in drawn
    ]
    folder = tmp_path_factory.mktemp("trip")
    raw = folder / "raw"
    raw.mkdir()
    with (raw / "train.jsonl").open("w") as file:
        for turns, images, videos in rows:
            row = {"messages": turns, "images": inline(images), "videos": inline(videos)}
            file.write(json.dumps(row) + "\n")
    write_shards(
        raw, folder / "shards", max_bad_ratio=0, num_workers=1, max_samples_per_shard=shard_size
    )
    prepare(folder / "shards", folder / "energon")
    found = {sample.__key__: sample for sample in read_split(folder / "energon", "train")}
    assert len(found) == len(rows)
    for number, (turns, images, videos) in enumerate(rows, 1):
        sample = found[f"train-{number:06d}"]
        assert sample.messages == turns
        assert sample.images == images
        assert sample.videos == videos


def inline(files):
    return ["data:;base64," + base64.b64encode(data).decode() for data in files]
