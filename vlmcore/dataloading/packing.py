"""Which samples share a row: best fit over a buffer, long samples first, rows of like length."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

LONG_SHARE = 1 / 16  # of a row; shorter samples fill any gap, so their order is left as it came
_TRIES = 6  # halvings of the doubt about how short rows can be: to 1/64 of it


def pack_by_length(lengths: Sequence[int], *, max_length: int) -> list[list[int]]:
    """Indices grouped so that no group's lengths sum past `max_length`, with few groups.

    Best fit: each sample goes into the group that it fills best. Long samples come first, the
    longest foremost, since they decide how full rows get; the others come in the buffer's order.
    Sorting those too would fill rows with samples of one length, and steps with one kind of
    sample, which trains worse.

    What a buffer lacks of full rows is spread over all of them: data parallel ranks wait for the
    longest row of a step, so one short row among full ones would save nothing.

    Raises:
        ValueError: A sample alone is longer than `max_length`.
    """
    if not lengths:
        return []
    longest = max(lengths)
    if longest > max_length:
        raise ValueError(f"a sample of {longest} tokens is longer than a row of {max_length}")
    long = max_length * LONG_SHARE
    order = sorted(
        range(len(lengths)), key=lambda i: (-lengths[i], i) if lengths[i] > long else (0, i)
    )
    groups = _best_fit(order, lengths, max_length)
    enough, low = max_length, max(longest, -(-sum(lengths) // len(groups)))
    for _ in range(_TRIES):
        middle = (low + enough) // 2
        even = _best_fit(order, lengths, middle)
        if len(even) > len(groups):
            low = middle + 1
        else:
            groups, enough = even, middle
    return sorted((sorted(group) for group in groups), key=lambda group: group[0])


def _best_fit(order: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    groups: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, group), sorted
    for index in order:
        length = lengths[index]
        best = bisect_left(rooms, (length, -1))
        if best == len(rooms):
            groups.append([index])
            insort(rooms, (capacity - length, len(groups) - 1))
        else:
            room, group = rooms.pop(best)
            groups[group].append(index)
            insort(rooms, (room - length, group))
    return groups
