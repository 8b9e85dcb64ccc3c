"""Which rows of a split a recipe's `limit` and `sample` take: the same ones on every machine."""

import heapq
from collections.abc import Sequence
from hashlib import blake2b


def select_rows(
    num_rows: int, *, limit: int | None, sample: int | None, seed: int, split: str
) -> Sequence[int]:
    """Numbers of the rows that are taken, ascending: `sample` of the first `limit` rows.

    A row's luck depends on the seed, the split and its number alone, so that a larger sample holds
    every row of a smaller one.

    Args:
        num_rows: Rows of the split, counted from 0 over all its files.
        limit: The first so many; None: all.
        sample: So many of those, drawn without repetition; None: all.
        seed: Of the draw.
        split: Our name of the split; its draw is its own.
    """
    rows = range(num_rows if limit is None else min(limit, num_rows))
    if sample is None or sample >= len(rows):
        return rows

    def luck(row: int) -> bytes:
        return blake2b(f"{seed}/{split}/{row}".encode(), digest_size=16).digest()

    return sorted(heapq.nsmallest(sample, rows, key=luck))
