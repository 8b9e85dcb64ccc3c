"""Position ids of a sample: one counter for text, (temporal, height, width) grids for images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mrope_position_ids(
    input_ids: Tensor, grids_thw: Sequence[Sequence[int]], *, image_token_id: int, merge_size: int
) -> Tensor:
    """Positions [3, S] of a sample [S] whose image placeholders are already expanded.

    Text counts up by one. An image's merged patches take the grid's coordinates from the current
    count on, and the count then goes on past the longer of height and width. Same as
    `get_rope_index` of Qwen2.5-VL and Qwen3-VL in transformers 5.19, for images.

    Raises:
        ValueError: The placeholders do not match the grids.
    """
    pieces: list[Tensor] = []
    position, start = 0, 0
    is_image = input_ids == image_token_id
    for t, h, w in grids_thw:
        grid = (t, h // merge_size, w // merge_size)
        count = grid[0] * grid[1] * grid[2]
        found = is_image[start:].nonzero()
        begin = start + int(found[0]) if len(found) else len(input_ids)
        if int(is_image[begin : begin + count].sum()) != count:
            raise ValueError(
                f"an image of {count} features has {int(is_image[begin:].sum())} placeholders left"
            )
        text = begin - start
        pieces.append(torch.arange(position, position + text).expand(3, -1))
        position += text
        axes = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
        pieces.append(torch.stack(axes).reshape(3, -1) + position)
        position += max(grid[1], grid[2])
        start = begin + count
    if bool(is_image[start:].any()):
        raise ValueError(f"{int(is_image[start:].sum())} image placeholders have no image")
    pieces.append(torch.arange(position, position + len(input_ids) - start).expand(3, -1))
    return torch.cat(pieces, dim=1)
