"""Encoded samples and rows without a loader, for tests of what consumes them."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from PIL import Image
from torch import Tensor

from vlmcore.dataloading.encode import ConversationEncoder
from vlmcore.dataloading.samples import PackedRow, TokenSample, pack_row

Size = tuple[int, int]  # width and height in pixels
FRAMES_OF_A_PATCH = 2  # in every tiny model with grids


def noise(size: Size, *, seed: int = 0) -> Image.Image:
    """An image in which no two patches are alike; the same on every rank."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def token_sample(encoder: ConversationEncoder, *turns: str, images: Sequence[Size]) -> TokenSample:
    """A user's and an assistant's turns in alternation; images of noise stand before the first."""
    tags = "<image>" * len(images)
    messages = [
        {"role": role, "content": text}
        for role, text in zip(
            cycle(["user", "assistant"]), (tags + turns[0], *turns[1:]), strict=False
        )
    ]
    processor = encoder.media
    media = [processor.image(size, alone=len(images) == 1) for size in images] if processor else []
    opened = [noise(size, seed=i) for i, size in enumerate(images)]
    text = encoder.encode(messages, media)
    return TokenSample(
        __key__=turns[0],
        __restore_key__=(),
        input_ids=text.input_ids,
        labels=text.labels,
        loss_scale=text.loss_scale,
        position_ids=text.position_ids,
        vision=processor.tensors(media, opened) if processor else {},
    )


def transformers_inputs(vision: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same as its own models want it: each frame of an image's patch is there."""
    inputs = dict(vision)
    pixels = inputs.get("pixel_values")
    if "image_grid_thw" in inputs and pixels is not None:
        frames = pixels.unflatten(1, (3, 1, -1)).expand(-1, -1, FRAMES_OF_A_PATCH, -1)
        inputs["pixel_values"] = frames.flatten(1)
    return inputs


def row_of(samples: Sequence[TokenSample], *, multiple: int = 1) -> PackedRow:
    vision = [sample.vision for sample in samples]
    return pack_row(samples, vision=vision, pad_token_id=0, multiple=multiple, dropped={})
