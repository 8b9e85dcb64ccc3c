"""Tokens, labels and positions beside what processors and models of transformers make."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.dataloading.conftest import SHELLS, Encoders
from tests.tiny.rows import noise
from vlmcore.dataloading.encode import (
    IGNORED,
    BadSampleError,
    ConversationEncoder,
    EncodedText,
)
from vlmcore.dataloading.positions import mrope_position_ids
from vlmcore.dataloading.rendering import GenerativeRenderer
from vlmcore.dataloading.video import VideoInfo
from vlmcore.errors import DataError

IMAGES = {
    "text": [],
    "one image": [(96, 64)],
    "several images of different sizes": [(64, 64), (33, 210), (300, 40)],
}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "It is 5."},
    {"role": "user", "content": "And doubled? 5"},
    {"role": "assistant", "content": "10, señor ☃"},
]
CLIP = VideoInfo(100, 70, fps=10.0, num_frames=37)
WITH_VIDEO = [name for name in SHELLS if name != "llava"]


@pytest.fixture(scope="module")
def vlm(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("qwen3_vl")


@pytest.fixture(scope="module")
def encoder(encoders: Encoders) -> ConversationEncoder:
    return encoders("qwen3_vl")


def question(images: list) -> list[dict[str, str]]:
    """Text before, between and after the images."""
    content = "Look" + "<image> and".join(["", *[""] * len(images)]) + " tell."
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "Done."}]


def encode(encoder: ConversationEncoder, images: list, **options: Any) -> EncodedText:
    media = [encoder.media.image(size, alone=len(images) == 1) for size in images]
    return encoder.encode(question(images), media, **options)


def features(encoder: ConversationEncoder, text: EncodedText) -> int:
    image = encoder.tokenizer.convert_tokens_to_ids(encoder.family.vision.image_token)
    return int((text.input_ids == image).sum())


def trained_text(encoder: ConversationEncoder, text: EncodedText) -> str:
    """What the labels ask for; each is the token that follows its position."""
    wanted = text.labels != IGNORED
    assert torch.equal(wanted, text.loss_scale > 0)
    assert torch.equal(text.labels[:-1][wanted[:-1]], text.input_ids[1:][wanted[:-1]])
    assert not wanted[-1]
    return encoder.tokenizer.decode(text.labels[wanted])


@pytest.mark.parametrize("images", IMAGES.values(), ids=IMAGES)
def test_tokens_equal_what_the_processor_expands_to(
    encoders: Encoders, shell: str, images: list
) -> None:
    encoder = encoders(shell)
    processor = encoder.media.processor
    turns = question(images)
    parts: list[dict] = []
    for i, text in enumerate(turns[0]["content"].split("<image>")):
        parts += [{"type": "image"}] * bool(i) + [{"type": "text", "text": text}]
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}, turns[1]], tokenize=False
    )
    opened = [noise(size, seed=i) for i, size in enumerate(images)]
    expected = processor(text=[text], images=[opened] if opened else None, return_tensors="pt")
    assert encode(encoder, images).input_ids.tolist() == expected["input_ids"][0].tolist()


def mixed(encoder: ConversationEncoder) -> tuple[list[dict], list]:
    """A video right behind a word, where the tokens of what replaces it could run together."""
    turns = [
        {"role": "user", "content": "Watch<video>then<image><image>?"},
        {"role": "assistant", "content": "Yes."},
    ]
    media = [
        encoder.media.video(CLIP),
        *(encoder.media.image(size, alone=False) for size in ((96, 64), (40, 200))),
    ]
    return turns, media


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_tokens_of_a_video_equal_what_the_processor_expands_to(
    encoders: Encoders, name: str
) -> None:
    from transformers.video_utils import VideoMetadata

    encoder = encoders(name)
    turns, media = mixed(encoder)
    parts = [
        {"type": "text", "text": "Watch"},
        {"type": "video"},
        {"type": "text", "text": "then"},
        {"type": "image"},
        {"type": "image"},
        {"type": "text", "text": "?"},
    ]
    processor = encoder.media.processor
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}, turns[1]], tokenize=False
    )
    frames = media[0].frames
    expected = processor(
        text=[text],
        images=[[noise((96, 64)), noise((40, 200))]],
        videos=[torch.zeros(len(frames), 3, 70, 100, dtype=torch.uint8)],
        video_metadata=[VideoMetadata(total_num_frames=37, fps=10.0, frames_indices=list(frames))],
        do_sample_frames=False,
        return_tensors="pt",
    )
    found = encoder.encode(turns, media)
    assert found.input_ids.tolist() == expected["input_ids"][0].tolist()
    assert trained_text(encoder, found).startswith("Yes.")


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("images", [*IMAGES.values(), None], ids=[*IMAGES, "a video too"])
def test_positions_equal_transformers(
    tiny_model: Callable[..., Path], encoders: Encoders, name: str, images: list | None
) -> None:
    import transformers

    encoder = encoders(name)
    with torch.device("meta"):
        cls = getattr(transformers, encoder.family.architecture)
        model = cls(transformers.AutoConfig.from_pretrained(tiny_model(name))).model
    if images is None:
        text = encoder.encode(*mixed(encoder))
    else:
        text = encode(encoder, images)
    ids = text.input_ids[None]
    grids = {
        is_video: torch.tensor([m.grid for m in text.media if bool(m.video) == is_video])
        for is_video in (False, True)
    }
    kinds = (ids == model.config.image_token_id) + 2 * (ids == model.config.video_token_id)
    options = {}
    if name == "qwen2_5_vl":
        options["second_per_grid_ts"] = [m.seconds_per_step for m in text.media if m.video]
    expected, _ = model.get_rope_index(
        ids,
        kinds.int(),
        image_grid_thw=grids[False] if len(grids[False]) else None,
        video_grid_thw=grids[True] if len(grids[True]) else None,
        **options,
    )
    assert text.position_ids.tolist() == expected[:, 0].tolist()


def test_positions_of_images_side_by_side() -> None:
    """Two images with nothing between them; 9 is the placeholder, grids are in patches."""
    ids = torch.tensor([1, *[9] * 2, *[9] * 6, 2])
    found = mrope_position_ids(ids, [(1, 2, 4), (1, 6, 4)], image_token_id=9, merge_size=2)
    assert found.T.tolist() == [
        [0, 0, 0],
        *([1, 1, 1], [1, 1, 2]),
        *([3, 3, 3], [3, 3, 4], [3, 4, 3], [3, 4, 4], [3, 5, 3], [3, 5, 4]),
        [6, 6, 6],
    ]


@pytest.mark.parametrize(
    ("num_placeholders", "fault"), [(3, "has 3 placeholders left"), (5, "have no image")]
)
def test_placeholders_that_do_not_match_the_grids_are_refused(
    num_placeholders: int, fault: str
) -> None:
    ids = torch.tensor([1, *[9] * num_placeholders, 2])
    with pytest.raises(ValueError, match=fault):
        mrope_position_ids(ids, [(1, 4, 4)], image_token_id=9, merge_size=2)


def test_sft_trains_on_assistant_turns_and_their_ends(encoders: Encoders) -> None:
    for name in ("qwen3", "llama", *SHELLS):
        text = encoders(name).encode(TURNS)
        expected = "It is 5.<|im_end|>10, señor ☃<|im_end|>"
        assert trained_text(encoders(name), text) == expected, name
        assert set(text.loss_scale.tolist()) == {0.0, 1.0}


def test_which_turns_are_trained_is_said_by_the_stage_and_by_the_message(
    encoders: Encoders,
) -> None:
    def trained(loss_scale: str, turns: list) -> str:
        encoder = encoders("qwen3_vl", loss_scale=loss_scale)
        return trained_text(encoder, encoder.encode(turns))

    silenced = [turn | {"loss_scale": 0.0} if "5." in turn["content"] else turn for turn in TURNS]
    assert trained("last_round", TURNS) == "10, señor ☃<|im_end|>"
    assert trained("default", silenced) == "10, señor ☃<|im_end|>"
    assert "<|im_start|>user" in trained("all", TURNS)
    encoder = encoders("qwen3_vl")
    halved = [turn | {"loss_scale": 0.5} if "10" in turn["content"] else turn for turn in TURNS]
    scale = encoder.encode(halved).loss_scale
    assert scale.unique().tolist() == [0.0, 0.5, 1.0]
    assert scale[: (scale == 1).nonzero().max() + 1].max() == 1.0  # the earlier turn
    assert scale[(scale == 1).nonzero().max() + 1 :].max() == 0.5


@pytest.mark.parametrize("name", ["qwen3", *SHELLS])
def test_pt_is_the_plain_text_and_its_end_all_of_it_trained(encoders: Encoders, name: str) -> None:
    encoder = encoders(name, task="pt")
    text = encoder.encode([{"role": "assistant", "content": "Once upon a time"}])
    assert encoder.tokenizer.decode(text.input_ids) == "Once upon a time<|im_end|>"
    assert int((text.labels != IGNORED).sum()) == len(text.input_ids) - 1


def test_pt_puts_images_where_they_stand_and_trains_the_text_around_them(
    encoders: Encoders, shell: str
) -> None:
    encoder = encoders(shell, task="pt")
    media = [encoder.media.image(size, alone=False) for size in ((96, 64), (64, 150))]
    document = [{"role": "assistant", "content": "A cat <image> beside <image> a dog"}]
    text = encoder.encode(document, media)
    chat = encoders(shell)
    in_chat = chat.encode([{"role": "user", "content": "<image><image>"}, TURNS[2]], media)
    assert features(encoder, text) == features(chat, in_chat) > 0
    trained = trained_text(encoder, text)
    for words in (" cat ", " beside ", " a dog<|im_end|>"):
        assert words in trained
    assert encoder.family.vision.image_token not in trained
    if "qwen" in shell:
        assert trained.count("<|vision_start|>") == trained.count("<|vision_end|>") == 2


def test_a_template_that_moves_images_to_the_front_still_gives_their_token(
    encoders: Encoders,
) -> None:
    tokenizer = encoders("llava").tokenizer
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = (
            "{% for m in messages %}{% for c in m.content if c.type == 'image' %}<image>\n"
            "{% endfor %}{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %}"
            "{% endfor %}"
        )
        assert GenerativeRenderer(tokenizer, {"image": "<image>"}).markup == {"<image>": "<image>"}
    finally:
        tokenizer.chat_template = template


@pytest.mark.parametrize("sizes", [[(96, 64)], [(64, 64), (33, 210), (150, 40)]])
def test_a_cut_never_falls_into_an_image(encoders: Encoders, shell: str, sizes: list) -> None:
    encoder = encoders(shell)
    media = [encoder.media.image(size, alone=len(sizes) == 1) for size in sizes]
    turns = question(sizes)
    whole = encoder.encode(turns, media)
    each = [features(encoder, encoder.encode(question([0]), [medium])) for medium in media]
    allowed = set(np.cumsum([0, *each]).tolist())
    opening = set(encoder.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<img>"]))
    seen = set()
    for length in range(1, len(whole.input_ids) + 1):
        text = encoder.encode(turns, media, cut_at=length)
        assert len(text.input_ids) <= length
        assert torch.equal(text.input_ids, whole.input_ids[: len(text.input_ids)])
        assert features(encoder, text) in allowed
        assert features(encoder, text) == sum(each[: len(text.media)])
        assert int(text.input_ids[-1]) not in opening
        assert text.position_ids.shape == (3, len(text.input_ids))
        assert text.labels[-1] == IGNORED
        seen.add(len(text.media))
    assert seen == set(range(len(sizes) + 1))
    assert torch.equal(text.labels, whole.labels)


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_a_cut_never_falls_into_a_video(encoders: Encoders, name: str) -> None:
    encoder = encoders(name)
    turns = [
        {"role": "user", "content": "See <video> now"},
        {"role": "assistant", "content": "Yes."},
    ]
    media = [encoder.media.video(CLIP)]
    whole = encoder.encode(turns, media)
    start = len(encoder.encode(turns, media, cut_at=25).input_ids)
    for length in range(start, len(whole.input_ids), 7):
        text = encoder.encode(turns, media, cut_at=length)
        assert text.media or len(text.input_ids) == start


def test_a_template_that_rewrites_earlier_turns_is_refused(vlm: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(vlm, tmp_path / "copy")
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").write_text("{{ messages | length }}" + template)
    with pytest.raises(DataError, match="not prefix-stable"):
        ConversationEncoder(copy, task="sft").encode(TURNS)


def test_sft_needs_a_chat_template_and_pt_does_not(vlm: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(vlm, tmp_path / "copy")
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="no chat template"):
        ConversationEncoder(copy, task="sft")
    text = ConversationEncoder(copy, task="pt").encode(TURNS[2:3])
    assert (text.labels != IGNORED).sum() > 3


@pytest.mark.parametrize(("tags", "images"), [(2, 1), (1, 2), (0, 1), (1, 0)])
def test_tags_that_do_not_match_the_images_make_a_bad_sample(
    encoder: ConversationEncoder, tags: int, images: int
) -> None:
    turns = [
        {"role": "user", "content": "<image>" * tags},
        {"role": "assistant", "content": "x"},
    ]
    media = [encoder.media.image((64, 64), alone=False)] * images
    with pytest.raises(BadSampleError, match=f"{images} images and videos") as refusal:
        encoder.encode(turns, media)
    assert refusal.value.cause == "tag_mismatch"


def test_a_placeholder_in_the_text_itself_makes_a_bad_sample(
    encoders: Encoders, shell: str
) -> None:
    encoder = encoders(shell)
    tokens = {*encoder.family.vision.tokens.values(), *encoder.media.placeholders.values()}
    for token in sorted(tokens - {"<image>", "<video>"}):  # those are tags, which stand for media
        turns = [TURNS[1], {"role": "assistant", "content": f"A {token} token"}]
        with pytest.raises(BadSampleError) as refusal:
            encoder.encode(turns)
        assert refusal.value.cause == "literal_placeholder"
        assert token in str(refusal.value)


def test_the_placeholder_is_found_by_name_whatever_its_id(vlm: Path, tmp_path: Path) -> None:
    """In a vocabulary of one token less, the id that was the placeholder's is a video's."""
    copy = shutil.copytree(vlm, tmp_path / "copy")
    gone = "<|vision_pad|>"
    data = json.loads((copy / "tokenizer.json").read_text())
    kept = [token for token in data["added_tokens"] if token["content"] != gone]
    first = kept[0]["id"]
    data["added_tokens"] = [token | {"id": first + i} for i, token in enumerate(kept)]
    (copy / "tokenizer.json").write_text(json.dumps(data))
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config["extra_special_tokens"].remove(gone)
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    before, after = (ConversationEncoder(folder, task="sft") for folder in (vlm, copy))
    old, new = (e.tokenizer.convert_tokens_to_ids("<|image_pad|>") for e in (before, after))
    assert new == old - 1
    assert after.tokenizer.convert_ids_to_tokens(old) == "<|video_pad|>"
    found, expected = encode(after, [(96, 64)]), encode(before, [(96, 64)])
    assert int((found.input_ids == new).sum()) == 6
    assert torch.equal(found.input_ids == new, expected.input_ids == old)
    assert torch.equal(found.position_ids, expected.position_ids)
