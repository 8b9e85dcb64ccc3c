import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from data_prep.sources import fetch


@pytest.fixture(scope="session")
def numbers(tmp_path_factory):
    """A small raw dataset of handwritten numbers, for reading only."""
    raw = tmp_path_factory.mktemp("numbers") / "raw"
    fetch("builtin:handwritten_numbers", raw, options={"train": 40, "val": 6, "test": 10}, seed=0)
    return raw


@pytest.fixture
def make_raw(tmp_path):
    """Writes a raw dataset: `make_raw(train=[row or raw line, …])`, beside two images."""

    def make(**splits):
        raw = tmp_path / "raw"
        (raw / "images").mkdir(parents=True)
        gradient(40, 30).save(raw / "images" / "a.png")
        gradient(64, 48).save(raw / "images" / "b.jpg", quality=60)
        for split, rows in splits.items():
            lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
            (raw / f"{split}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
        return raw

    return make


def gradient(width, height):
    image = Image.new("RGB", (width, height))
    image.putdata([(x, y, (x * y) % 256) for y in range(height) for x in range(width)])
    return image


@pytest.fixture
def row():
    """Builds a row of the `messages` format; its defaults make a good one."""

    def build(question="<image>What is it?", answer="A gradient.", images=("images/a.png",)):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {"messages": turns, "images": list(images)}

    return build


@pytest.fixture
def tree_digest():
    """name → sha256 of every file under a folder."""

    def digest(folder: Path):
        files = (file for file in sorted(folder.rglob("*")) if file.is_file())
        return {
            file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in files
        }

    return digest


@pytest.fixture
def make_video(tmp_path):
    """Builds an MP4 of grey frames, each 8 levels brighter than the one before; its bytes."""

    def build(num_frames=30, fps=10, size=(64, 48)):
        path = tmp_path / "made.mp4"
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, size)
        for i in range(num_frames):
            writer.write(np.full((size[1], size[0], 3), 8 * (i % 30), np.uint8))
        writer.release()
        return path.read_bytes()

    return build
