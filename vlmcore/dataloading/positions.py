"""Position ids of a sample: one counter for text, (temporal, height, width) grids for images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

Grid = Sequence[int]  # patches over time, height and width


def mrope_position_ids(
    input_ids: Tensor,
    grids_thw: Sequence[Grid],
    *,
    image_token_id: int,
    merge_size: int,
    video_grids_thw: Sequence[Grid] = (),
    video_token_id: int | None = None,
    video_intervals: Sequence[float] | None = None,
) -> Tensor:
    """Positions [3, S] of a sample [S] whose placeholders are already expanded.

    Text counts up by one. An image's merged patches take the grid's coordinates from the current
    count on, and the count then goes on past the longer of height and width. Same as
    `get_rope_index` of Qwen2.5-VL and Qwen3-VL in transformers 5.19.

    Args:
        input_ids: [S].
        grids_thw: Patches of each image.
        image_token_id: Placeholder of an image's merged patches.
        merge_size: Patches a side of a merged one.
        video_grids_thw: Patches of each video.
        video_token_id: Placeholder of a video's merged patches.
        video_intervals: Temporal positions from one grid step to the next, per video (Qwen2.5-VL:
            tokens per second · seconds per step). None: text with the time stands between the
            steps, so each counts as an image (Qwen3-VL).

    Raises:
        ValueError: The placeholders do not match the grids.
    """
    blocks = {image_token_id: iter([(grid, 1.0) for grid in grids_thw])}
    if video_token_id is not None:
        blocks[video_token_id] = _video_blocks(video_grids_thw, video_intervals)
    ids = input_ids.numpy()
    placed = np.flatnonzero(np.logical_or.reduce([ids == token for token in blocks]))
    positions = np.empty((3, len(ids)), dtype=np.int64)
    position, start, num_before = 0, 0, 0
    while start < len(ids):
        end = int(placed[num_before]) if num_before < len(placed) else len(ids)
        if start < end:
            positions[:, start:end] = np.arange(position, position + end - start)
            position, start = position + end - start, end
            continue
        token = ids[start]
        block = next(blocks[int(token)], None)
        if block is None:
            raise ValueError(f"{(ids[start:] == token).sum()} image placeholders have no image")
        (t, h, w), interval = block
        h, w = h // merge_size, w // merge_size
        num_before += t * h * w
        end = start + t * h * w
        if end > len(ids) or (ids[start:end] != token).any():
            raise ValueError(
                f"an image of {t * h * w} features has {(ids[start:] == token).sum()} "
                f"placeholders left"
            )
        times = (np.arange(t, dtype=np.float32) * np.float32(interval)).astype(np.int64)
        grid = positions[:, start:end].reshape(3, t, h, w)
        assert grid.base is positions
        grid[0] = times[:, None, None] + position
        grid[1] = np.arange(position, position + h)[:, None]
        grid[2] = np.arange(position, position + w)
        position, start = position + max(h, w), end
    if left := sum(1 for rest in blocks.values() for _ in rest):
        raise ValueError(f"{left} images have no placeholders left")
    return torch.from_numpy(positions)


def _video_blocks(
    grids_thw: Sequence[Grid], intervals: Sequence[float] | None
) -> Iterator[tuple[Grid, float]]:
    if intervals is not None:
        return zip(grids_thw, intervals, strict=True)
    return ((((1, h, w), 1.0)) for t, h, w in grids_thw for _ in range(t))
