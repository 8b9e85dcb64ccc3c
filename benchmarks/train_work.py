"""The work of `train_cpu.py`: a Qwen2.5-VL of 1 M parameters, and two sets of handwritten digits.

`digits`: 512 samples, a picture of one to four digits and what they say, about 75 tokens each.
`mixed`: 384 samples of 60 to 1,500 tokens (as many of each magnitude), one to four turns, up to
four pages of digits pasted together, which the answers copy down.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

DIGIT_PX = 28  # a merged image token of Qwen2.5-VL
NUM_SAMPLES = {"digits": 512, "mixed": 384}
SHORTEST, LONGEST = 60, 1500  # tokens of a mixed sample
MAX_SIDE = 16  # digits
MAX_PAGES = 4
VOCAB_SIZE = 512
PHRASES = ("What number is written in the image?", "The image shows ", "Copy the page row by row.")
SYSTEM_TOKENS, PAGE_TURN_TOKENS, TEXT_TURN_TOKENS = 17, 30, 22  # of a mixed sample's template
PROCESSOR = {
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "size": {"shortest_edge": DIGIT_PX**2, "longest_edge": (MAX_SIDE * DIGIT_PX) ** 2},
    "processor_class": "Qwen2_5_VLProcessor",
}

Row = dict[str, Any]


def write_raw(name: str, folder: Path) -> None:
    """A dataset's pictures and its `train.jsonl`, whose image paths both systems understand."""
    (folder / "images").mkdir(parents=True)
    draw = random.Random(0)
    rows = {"digits": number_rows, "mixed": mixed_rows}[name](page_writer(folder, draw), draw)
    with (folder / "train.jsonl").open("w") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


Page = tuple[str, list[str]]  # image file, rows of digits


def page_writer(folder: Path, draw: random.Random) -> Callable[[int, int], Page]:
    """What pastes rows × columns of random digits together, writes them, and says which."""
    from sklearn.datasets import load_digits

    from data_prep.sources.handwritten_numbers import compose

    scans = load_digits()

    def write(num_rows: int, num_columns: int) -> Page:
        picked = [draw.choices(range(len(scans.target)), k=num_columns) for _ in range(num_rows)]
        lines = [np.asarray(compose(scans.images[line], digit_px=DIGIT_PX)) for line in picked]
        name = f"images/{draw.getrandbits(64):016x}.png"
        Image.fromarray(np.concatenate(lines)).save(folder / name)
        return name, ["".join(map(str, scans.target[line])) for line in picked]

    return write


def number_rows(write_page: Callable[[int, int], Page], draw: random.Random) -> Iterator[Row]:
    for _ in range(NUM_SAMPLES["digits"]):
        name, (number,) = write_page(1, draw.randint(1, 4))
        messages = [
            turn("system", "You are a helpful assistant."),
            turn("user", f"<image>{PHRASES[0]}"),
            turn("assistant", f"{PHRASES[1]}{number}."),
        ]
        yield {"messages": messages, "images": [name]}


def mixed_rows(write_page: Callable[[int, int], Page], draw: random.Random) -> Iterator[Row]:
    """Each turn takes a share of the tokens that are left, for a page and its copy, or for text."""
    for _ in range(NUM_SAMPLES["mixed"]):
        messages, images = [turn("system", PHRASES[2])], []
        left = SHORTEST * (LONGEST / SHORTEST) ** draw.random() - SYSTEM_TOKENS
        for turns_left in range(draw.randint(1, min(4, max(1, int(left / 60)))), 0, -1):
            share = left / turns_left
            side = min(MAX_SIDE, int(((share - PAGE_TURN_TOKENS) / 2) ** 0.5)) if share > 40 else 0
            if side > 1 and len(images) < MAX_PAGES and draw.random() < 0.8:
                name, lines = write_page(side, side)
                images.append(name)
                messages += [
                    turn("user", f"<image>{PHRASES[0]}"),
                    turn("assistant", "".join(lines)),
                ]
                left -= PAGE_TURN_TOKENS + 2 * side**2
                continue
            size = max(2, round(share - TEXT_TURN_TOKENS))
            digits = "".join(draw.choices("0123456789", k=size))
            messages += [turn("user", digits[: size // 2]), turn("assistant", digits[size // 2 :])]
            left -= TEXT_TURN_TOKENS + size
        yield {"messages": messages, "images": images}


def turn(role: str, content: str) -> Row:
    return {"role": role, "content": content}


def write_model(folder: Path) -> None:
    """Random weights: text 128 wide and 4 layers, tower 64 wide and 4 layers, half with windows."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from vlmcore.surgery.builtin import build_tokenizer

    tokenizer = build_tokenizer(list(PHRASES) * 9, vocab_size=VOCAB_SIZE)
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
           for name in ("image_pad", "video_pad", "vision_start", "vision_end")}  # fmt: skip
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "bos_token_id": pad, "eos_token_id": end, "pad_token_id": pad,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6],
            },
        },
        vision_config={
            "depth": 4,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [1, 3],
            "window_size": 112,
            "patch_size": 14,
            "spatial_merge_size": 2,
        },
        **{f"{name.replace('_pad', '')}_token_id": value for name, value in ids.items()},
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for prefix, kind in (("", "image_processor_type"), ("video_", "video_processor_type")):
        classes = {"": "Qwen2VLImageProcessor", "video_": "Qwen2VLVideoProcessor"}
        text = json.dumps(PROCESSOR | {kind: classes[prefix]}, indent=1)
        (folder / f"{prefix}preprocessor_config.json").write_text(text)
