"""Encoders of every family's tiny model, and a video file."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlmcore.dataloading.encode import ConversationEncoder
from vlmcore.families import FAMILIES

SHELLS = sorted(name for name, family in FAMILIES.items() if family.vision)
Encoders = Callable[..., ConversationEncoder]
VIDEO = {"fps": 10.0, "num_frames": 23, "size": (96, 64)}  # width, height


@pytest.fixture(scope="session")
def encoders(tiny_model: Callable[..., Path]) -> Encoders:
    """`encoders("internvl", task="pt")`, each built once."""

    @cache
    def get(name: str, **options: Any) -> ConversationEncoder:
        return ConversationEncoder(tiny_model(name), **({"task": "sft"} | options))

    return get


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest) -> str:
    """The name of a vision-language family."""
    return request.param


@pytest.fixture(scope="session")
def video_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Frame `i` is gray of level 10 · i."""
    import cv2

    path = tmp_path_factory.mktemp("video") / "gray.mp4"
    writer = cv2.VideoWriter(
        str(path), cv2.VideoWriter_fourcc(*"mp4v"), VIDEO["fps"], VIDEO["size"]
    )
    width, height = VIDEO["size"]
    for i in range(VIDEO["num_frames"]):
        writer.write(np.full((height, width, 3), 10 * i, np.uint8))
    writer.release()
    return path.read_bytes()
