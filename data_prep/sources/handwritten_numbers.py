"""`builtin:handwritten_numbers`: pictures of 1-4 handwritten digits, to be read aloud.

The digits are the 1,797 scans of scikit-learn's `load_digits` (8 x 8 pixels, 16 grey levels). They
are split by scan, so that no digit in a val or test picture was ever seen in training.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

VERSION = 1
QUESTION = "Read the number."
MAX_DIGITS = 4
POOL_SIZES = {"train": 1400, "val": 147, "test": 250}
# Which scan is in which split does not follow the seed: test digits stay unseen across seeds too.
POOL_SEED = 0


class Options(BaseModel):
    """How many pictures, and how large."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    digit_px: int = Field(
        32, ge=8, le=1024, description="Width and height of a digit, in pixels (patch x merge)."
    )
    train: int = Field(4000, ge=1, description="Number of pictures to train on.")
    val: int = Field(500, ge=0, description="Number of pictures to validate on.")
    test: int = Field(500, ge=0, description="Number of pictures to score on.")


def write(dest: Path, *, options: Options, seed: int) -> None:
    """Write `images/*.png` and one JSONL a split, in the `messages` format."""
    from sklearn.datasets import load_digits  # here: its import takes a second

    scans = load_digits()
    (dest / "images").mkdir()
    for index, (split, pool) in enumerate(scan_pools().items()):
        if not getattr(options, split):
            continue
        # A generator a split: the number of training pictures does not change the test ones.
        rng = np.random.default_rng([seed, index])
        with (dest / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for number in range(1, getattr(options, split) + 1):
                picked = rng.choice(pool, size=rng.integers(1, MAX_DIGITS + 1))
                row = _row(f"{split}-{number:06d}", answer="".join(map(str, scans.target[picked])))
                image = compose(scans.images[picked], digit_px=options.digit_px)
                image.save(dest / row["images"][0], compress_level=1)
                file.write(json.dumps(row) + "\n")


def scan_pools() -> dict[str, np.ndarray]:
    """The scan numbers that each split may draw from; no scan is in two of them."""
    order = np.random.default_rng(POOL_SEED).permutation(sum(POOL_SIZES.values()))
    ends = np.cumsum(list(POOL_SIZES.values()))[:-1]
    return dict(zip(POOL_SIZES, np.split(order, ends), strict=True))


def compose(scans_NHW: np.ndarray, *, digit_px: int) -> Image.Image:
    """The scans side by side, dark ink on light paper, RGB.

    Args:
        scans_NHW: ink of N scans, from 0 (paper) to 16 (full).
        digit_px: height of the picture, and its width a digit.
    """
    ink_HW = np.concatenate(list(scans_NHW), axis=1)
    grey_HW = (255 - ink_HW * (255 / 16)).round().astype(np.uint8)
    size = (digit_px * len(scans_NHW), digit_px)
    return Image.fromarray(grey_HW).resize(size, Image.Resampling.BICUBIC).convert("RGB")


def _row(name: str, *, answer: str) -> dict:
    return {
        "id": name,
        "messages": [
            {"role": "user", "content": f"<image>{QUESTION}"},
            {"role": "assistant", "content": answer},
        ],
        "images": [f"images/{name}.png"],
    }
