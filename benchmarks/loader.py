"""The data loader alone: samples a second on one core, and how full its rows get.

    python benchmarks/loader.py [--json]

Two energon datasets from their shards, with the builtin tiny Qwen3-VL's processor: handwritten
numbers (1 to 4 image tokens), and a mixed-length set (60 to 1,500 tokens, none to three photographs
of 100 to 500 pixels, one to four turns). Time is of the processor, after a warm-up; a packing
buffer holds 512 samples.
"""

import argparse
import io
import json
import random
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

NUM_HANDWRITING = 2_000
NUM_MIXED = 600
WORDS = ("the", "of", "and", "a", "to", "in", "is", "that", "it", "was", "for", "on", "are")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = parser.parse_args().json
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder))
    if as_json:
        sys.stdout.write(json.dumps(figures) + "\n")
        return
    for name, value in figures.items():
        sys.stdout.write(f"{name}: {value}\n")


def measure(folder: Path) -> dict[str, float]:
    import torch

    from data_prep.sources import fetch
    from vlmcore import compat
    from vlmcore.surgery.donors import fetch_donor

    compat.install()
    torch.set_num_threads(1)
    model = folder / "model"
    fetch_donor("builtin:tiny-qwen3-vl", model, seed=0)
    handwriting, mixed = folder / "handwriting", folder / "mixed"
    counts = {"train": NUM_HANDWRITING, "val": 0, "test": 1}
    fetch("builtin:handwritten_numbers", handwriting / "raw", options=counts, seed=0)
    write_mixed(mixed / "raw")
    figures: dict[str, float] = {}
    for name, data, num_samples in (
        ("handwriting", handwriting, NUM_HANDWRITING),
        ("mixed", mixed, NUM_MIXED),
    ):
        dataset = prepared(data)
        for max_length in (384,) if name == "handwriting" else (4096, 8192):
            found = run(dataset, model, max_length=max_length, num_samples=num_samples)
            figures |= {f"{name}_{max_length}_{key}": value for key, value in found.items()}
    return figures


def prepared(folder: Path) -> Path:
    from data_prep.energon import prepare
    from data_prep.shards import write_shards

    write_shards(folder / "raw", folder / "shards", max_bad_ratio=0, num_workers=1)
    prepare(folder / "shards", folder / "energon")
    return folder / "energon"


def run(dataset: Path, model: Path, *, max_length: int, num_samples: int) -> dict[str, float]:
    from vlmcore.dataloading.encode import ConversationEncoder
    from vlmcore.dataloading.loader import train_loader
    from vlmcore.dataloading.task_encoder import ConversationTaskEncoder

    loader = train_loader(
        [dataset],
        ConversationTaskEncoder(ConversationEncoder(model, task="sft"), max_length=max_length),
        micro_batch_size=1,
        packing_buffer_size=512,
        seed=0,
        data_parallel_rank=0,
        data_parallel_size=1,
        blend_file=dataset / "blend.yaml",
    )
    rows = iter(loader)
    for _ in islice(rows, 5):
        pass
    began, samples, tokens = time.process_time(), 0, []
    while samples < num_samples:
        row = next(rows)
        samples += row.num_samples
        tokens.append(len(row.input_ids))
    seconds = time.process_time() - began
    return {
        "samples_per_s_per_core": round(samples / seconds),
        "tokens_per_s_per_core": round(sum(tokens) / seconds),
        "packing_fill": round(sum(tokens) / len(tokens) / max_length, 4),
        "shortest_row": round(min(tokens) / max_length, 4),
    }


def write_mixed(folder: Path) -> None:
    (folder / "images").mkdir(parents=True)
    draw = random.Random(0)
    with (folder / "train.jsonl").open("w") as file:
        for i in range(NUM_MIXED):
            images = [photograph(draw) for _ in range(draw.choice((0, 1, 1, 2, 3)))]
            names = [f"images/{i}_{j}.jpg" for j in range(len(images))]
            for name, image in zip(names, images, strict=True):
                (folder / name).write_bytes(image)
            turns = []
            for turn in range(draw.randint(1, 4)):
                tags = "<image>" * (len(images) if not turn else 0)
                turns += [
                    {"role": "user", "content": tags + prose(draw, 10)},
                    {"role": "assistant", "content": prose(draw, draw.randint(5, 90))},
                ]
            file.write(json.dumps({"messages": turns, "images": names}) + "\n")


def photograph(draw: random.Random) -> bytes:
    """A JPEG of about the size that a photograph of its pixels has."""
    width, height = draw.randint(100, 500), draw.randint(100, 500)
    coarse = np.random.default_rng(draw.getrandbits(32)).integers(0, 256, (24, 24, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize((width, height)).save(out, "JPEG", quality=90)
    return out.getvalue()


def prose(draw: random.Random, num_words: int) -> str:
    return " ".join(draw.choices(WORDS, k=num_words))


if __name__ == "__main__":
    main()
