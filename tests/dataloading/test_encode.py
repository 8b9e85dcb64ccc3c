import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny.rows import noise
from vlmcore.dataloading.encode import IGNORED, ConversationEncoder, EncodedText
from vlmcore.dataloading.positions import mrope_position_ids
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


@pytest.fixture(scope="module")
def vlm(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("qwen3_vl")


@pytest.fixture(scope="module")
def encoder(vlm: Path) -> ConversationEncoder:
    return ConversationEncoder(vlm, task="sft")


@pytest.fixture(scope="module")
def processor(vlm: Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(vlm)


def question(images: list) -> list[dict[str, str]]:
    """Text before, between and after the images."""
    content = "Look" + "<image> and".join(["", *[""] * len(images)]) + " tell."
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "Done."}]


def encode(encoder: ConversationEncoder, images: list) -> EncodedText:
    return encoder.encode(question(images), [encoder.grid(size) for size in images])


def trained_text(encoder: ConversationEncoder, text: EncodedText) -> str:
    """What the labels ask for; each is the token that follows its position."""
    wanted = text.labels != IGNORED
    assert torch.equal(text.labels[:-1][wanted[:-1]], text.input_ids[1:][wanted[:-1]])
    assert not wanted[-1]
    return encoder.tokenizer.decode(text.labels[wanted])


@pytest.mark.parametrize("images", IMAGES.values(), ids=IMAGES)
def test_tokens_equal_what_the_processor_expands_to(
    encoder: ConversationEncoder, processor: Any, images: list
) -> None:
    turns = question(images)
    parts: list[dict] = []
    for i, text in enumerate(turns[0]["content"].split("<image>")):
        parts += [{"type": "image"}] * bool(i) + [{"type": "text", "text": text}]
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}, turns[1]], tokenize=False
    )
    opened = [noise(size, seed=i) for i, size in enumerate(images)]
    expected = processor(text=[text], images=opened or None, return_tensors="pt")
    found = encode(encoder, images)
    assert found.input_ids.tolist() == expected["input_ids"][0].tolist()
    if images:
        pixels, grids = encoder.patches(opened)
        assert grids.tolist() == expected["image_grid_thw"].tolist()
        assert torch.equal(pixels, expected["pixel_values"])
        assert len(pixels) == 4 * int((found.input_ids == encoder.image_token_id).sum())


@pytest.mark.parametrize("images", IMAGES.values(), ids=IMAGES)
def test_positions_equal_transformers(
    vlm: Path, encoder: ConversationEncoder, images: list
) -> None:
    from transformers import AutoConfig, Qwen3VLModel

    with torch.device("meta"):
        model = Qwen3VLModel(AutoConfig.from_pretrained(vlm))
    text = encode(encoder, images)
    ids = text.input_ids[None]
    grids = torch.tensor([encoder.grid(size) for size in images]) if images else None
    expected, _ = model.get_rope_index(
        ids, (ids == encoder.image_token_id).int(), image_grid_thw=grids
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


@pytest.mark.parametrize("max_pixels", [None, 128 * 128])
@pytest.mark.parametrize("size", [(32, 32), (5, 70), (640, 480), (1000, 90), (47, 49)])
def test_the_grid_is_known_before_the_image_is_decoded(
    vlm: Path, size: tuple[int, int], max_pixels: int | None
) -> None:
    encoder = ConversationEncoder(vlm, task="sft", max_pixels=max_pixels)
    pixels, grids = encoder.patches([noise(size)])
    assert [list(encoder.grid(size))] == grids.tolist()
    assert len(pixels) == int(grids.prod())
    assert max_pixels is None or len(pixels) * 16 * 16 <= max_pixels


def test_sft_trains_on_assistant_turns_and_their_ends(encoder: ConversationEncoder) -> None:
    text = encoder.encode(TURNS, [])
    assert trained_text(encoder, text) == "It is 5.<|im_end|>10, señor ☃<|im_end|>"


def test_pt_trains_on_everything_but_images(vlm: Path) -> None:
    encoder = ConversationEncoder(vlm, task="pt")
    text = encoder.encode(TURNS, [])
    assert int((text.labels != IGNORED).sum()) == len(text.input_ids) - 1
    with_image = encode(encoder, [(96, 64)])
    assert encoder.image_token_id not in with_image.labels
    assert int((with_image.labels == IGNORED).sum()) == 6 + 1  # image tokens, and the last one


def test_a_template_that_rewrites_earlier_turns_is_refused(vlm: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(vlm, tmp_path / "copy")
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").write_text("{{ messages | length }}" + template)
    with pytest.raises(DataError, match="not prefix-stable"):
        ConversationEncoder(copy, task="sft").encode(TURNS, [])


def test_a_tokenizer_without_template_is_refused(vlm: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(vlm, tmp_path / "copy")
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="no chat template"):
        ConversationEncoder(copy, task="sft")


@pytest.mark.parametrize(
    ("tags", "grids", "fault"),
    [(2, 1, "more than 1 image placeholders"), (1, 2, "fewer than 2 image placeholders")],
)
def test_tags_that_do_not_match_the_images_are_refused(
    encoder: ConversationEncoder, tags: int, grids: int, fault: str
) -> None:
    turns = [
        {"role": "user", "content": "<image>" * tags},
        {"role": "assistant", "content": "x"},
    ]
    with pytest.raises(DataError, match=fault):
        encoder.encode(turns, [(1, 2, 2)] * grids)


def test_the_placeholder_is_found_by_name_whatever_its_id(vlm: Path, tmp_path: Path) -> None:
    """In a vocabulary of one token less, the id that was the placeholder's is a video's."""
    before = ConversationEncoder(vlm, task="sft")
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
    encoder = ConversationEncoder(copy, task="sft")
    old, new = before.image_token_id, encoder.image_token_id
    assert new == old - 1
    assert encoder.tokenizer.convert_ids_to_tokens(old) == "<|video_pad|>"
    found, expected = (encode(e, [(96, 64)]) for e in (encoder, before))
    assert int((found.input_ids == new).sum()) == 6
    assert torch.equal(found.input_ids == new, expected.input_ids == old)
    assert torch.equal(found.position_ids, expected.position_ids)
