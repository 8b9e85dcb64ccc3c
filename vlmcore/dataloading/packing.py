"""Which samples share a row: best-fit decreasing over a buffer."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack_by_length(lengths: Sequence[int], *, max_length: int) -> list[list[int]]:
    """Indices grouped so that no group's lengths sum past `max_length`, with few groups.

    Best-fit decreasing: the longest sample first, into the group that it fills best. Groups come
    in the order of their first sample in the buffer, so that a row mixes what the buffer mixed.

    Raises:
        ValueError: A sample alone is longer than `max_length`.
    """
    groups: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, group), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > max_length:
            raise ValueError(f"a sample of {length} tokens is longer than a row of {max_length}")
        best = bisect_left(rooms, (length, -1))
        if best == len(rooms):
            groups.append([index])
            insort(rooms, (max_length - length, len(groups) - 1))
        else:
            room, group = rooms.pop(best)
            groups[group].append(index)
            insort(rooms, (room - length, group))
    return sorted((sorted(group) for group in groups), key=lambda group: group[0])
