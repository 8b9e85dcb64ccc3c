"""`builtin:written_numbers`: text alone that teaches a language model to write numbers.

The digits stand where a vision model would put a picture of them, so that an aligner trained
afterwards has a language to align to.
"""

import json
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from data_prep.sources.handwritten_numbers import MAX_DIGITS, QUESTION

VERSION = 1


class Options(BaseModel):
    """How many conversations."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: int = Field(4000, ge=1, description="Number of conversations to train on.")
    val: int = Field(200, ge=0, description="Number of conversations to validate on.")


def write(dest: Path, *, options: Options, seed: int) -> None:
    """Write `train.jsonl` and `val.jsonl` in the `messages` format, without images."""
    for index, split in enumerate(("train", "val")):
        if not getattr(options, split):
            continue
        rng = np.random.default_rng([seed, index])
        with (dest / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for number in range(1, getattr(options, split) + 1):
                digits = rng.integers(10, size=rng.integers(1, MAX_DIGITS + 1))
                row = _row(f"{split}-{number:06d}", number="".join(map(str, digits)))
                file.write(json.dumps(row) + "\n")


def _row(name: str, *, number: str) -> dict:
    question = f"<|vision_start|>{number}<|vision_end|>{QUESTION}"
    return {
        "id": name,
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": number},
        ],
    }
