"""Where the boxes and edges of a pipeline's drawing go: layers from top to bottom, few crossings.

The steps are Sugiyama's: layers, bends for the edges that pass through a layer, order within each
layer by the neighbours' mean, then coordinates as close to the neighbours as boxes allow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

BOX_HEIGHT = 46
ROW_HEIGHT = 80
_CHAR_WIDTH = 6.9  # of the stage names' 12 px type
_BEND_WIDTH = 16
_GAP = 18
_MARGIN = 4
_SWEEPS = 12
_PULLS = 300

Point = str | tuple[str, str, int]  # a stage, or the bend of an edge (from, to) in a layer


@dataclass(frozen=True)
class Drawing:
    """A picture's size in px, each stage's upper left corner, and the edges as SVG paths."""

    width: float
    height: float
    box_width: float
    boxes: Mapping[str, tuple[float, float]]
    edges: Sequence[str]


def draw_graph(parents: Mapping[str, Sequence[str]]) -> Drawing:
    """The drawing of stages, each with those it was built from, which must stand before it."""
    layer_of = _layers(parents)
    num_layers = max(layer_of.values(), default=-1) + 1
    layers: list[list[Point]] = [[] for _ in range(num_layers)]
    for stage, layer in layer_of.items():
        layers[layer].append(stage)
    chains: list[list[Point]] = []
    for stage, froms in parents.items():
        for parent in dict.fromkeys(froms):
            between = range(layer_of[parent] + 1, layer_of[stage])
            bends: list[Point] = [(parent, stage, layer) for layer in between]
            for layer, bend in zip(between, bends, strict=True):
                layers[layer].append(bend)
            chains.append([parent, *bends, stage])
    above, below = _neighbours(chains)
    _sort(layers, above, below)
    box_width = max((len(stage) for stage in parents), default=0) * _CHAR_WIDTH + 24
    x = _place(layers, above, below, box_width)
    halves = {p: _BEND_WIDTH / 2 if isinstance(p, tuple) else box_width / 2 for p in x}
    left = min((x[p] - half for p, half in halves.items()), default=0.0) - _MARGIN
    right = max((x[p] + half for p, half in halves.items()), default=0.0) + _MARGIN
    x = {point: place - left for point, place in x.items()}
    y = {point: row * ROW_HEIGHT + _MARGIN for row, layer in enumerate(layers) for point in layer}
    return Drawing(
        width=round(right - left, 1),
        height=max(num_layers - 1, 0) * ROW_HEIGHT + BOX_HEIGHT + 2 * _MARGIN,
        box_width=round(box_width, 1),
        boxes={stage: (round(x[stage] - box_width / 2, 1), y[stage]) for stage in parents},
        edges=[_path([(x[point], y[point]) for point in chain]) for chain in chains],
    )


def _layers(parents: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Each stage just above the first that needs it, so that edges stay short."""
    height: dict[str, int] = dict.fromkeys(parents, 0)
    for stage in reversed(list(parents)):
        for parent in parents[stage]:
            height[parent] = max(height[parent], height[stage] + 1)
    top = max(height.values(), default=0)
    return {stage: top - above_bottom for stage, above_bottom in height.items()}


def _neighbours(
    chains: Sequence[Sequence[Point]],
) -> tuple[dict[Point, list[Point]], dict[Point, list[Point]]]:
    above: dict[Point, list[Point]] = {}
    below: dict[Point, list[Point]] = {}
    for chain in chains:
        for upper, lower in pairwise(chain):
            above.setdefault(lower, []).append(upper)
            below.setdefault(upper, []).append(lower)
    return above, below


def _sort(
    layers: list[list[Point]],
    above: Mapping[Point, Sequence[Point]],
    below: Mapping[Point, Sequence[Point]],
) -> None:
    """Orders each layer by the mean place of its neighbours, down and up in turn."""
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for layer in layers if down else layers[::-1]:
            links = above if down else below
            rank = {point: i for row in layers for i, point in enumerate(row)}
            mean = {
                point: _mean([rank[one] for one in links.get(point, ())], default=rank[point])
                for point in layer
            }
            layer.sort(key=mean.__getitem__)


def _place(
    layers: Sequence[Sequence[Point]],
    above: Mapping[Point, Sequence[Point]],
    below: Mapping[Point, Sequence[Point]],
    box_width: float,
) -> dict[Point, float]:
    """The centre of each point: near its neighbours' mean, never over another point."""
    x: dict[Point, float] = {}
    offsets: list[list[float]] = []
    for layer in layers:
        widths = [_BEND_WIDTH if isinstance(point, tuple) else box_width for point in layer]
        offset = [0.0]
        for one, other in pairwise(widths):
            offset.append(offset[-1] + (one + other) / 2 + _GAP)
        offsets.append(offset[: len(layer)])
        x |= {point: place - offset[-1] / 2 for point, place in zip(layer, offset, strict=True)}
    for _ in range(_PULLS):
        for layer, offset in zip(layers, offsets, strict=True):
            links = [[*above.get(point, ()), *below.get(point, ())] for point in layer]
            pulls = [[_pull(p, to) for to in ends] for p, ends in zip(layer, links, strict=True)]
            wanted = [
                sum(x[to] * pull for to, pull in zip(ends, own, strict=True)) / sum(own)
                if own
                else x[point]
                for point, ends, own in zip(layer, links, pulls, strict=True)
            ]
            bases = [want - place for want, place in zip(wanted, offset, strict=True)]
            free = _ascending(bases, [sum(own) or 1.0 for own in pulls])
            x |= {p: base + own for p, base, own in zip(layer, free, offset, strict=True)}
    return x


def _pull(one: Point, other: Point) -> float:
    """How strongly two linked points want to stand in line: bends most, or long edges zigzag."""
    return (1.0, 2.0, 16.0)[isinstance(one, tuple) + isinstance(other, tuple)]


def _ascending(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The ascending sequence nearest to `values` in least squares (pool adjacent violators)."""
    pools: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(values, weights, strict=True):
        pools.append((value, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (one, one_weight, one_length), (two, two_weight, two_length) = pools[-2:]
            both = one_weight + two_weight
            mean = (one * one_weight + two * two_weight) / both
            pools[-2:] = [(mean, both, one_length + two_length)]
    return [mean for mean, _, length in pools for _ in range(length)]


def _mean(values: Sequence[float], *, default: float) -> float:
    return sum(values) / len(values) if values else default


def _path(points: Sequence[tuple[float, float]]) -> str:
    """An SVG path from under the first box, straight through each layer, to over the last box."""
    (x, y), *rest = points
    y += BOX_HEIGHT
    path = f"M{x:.1f} {y:.0f}"
    for next_x, next_y in rest:
        middle = (y + next_y) / 2
        path += f"C{x:.1f} {middle:.0f} {next_x:.1f} {middle:.0f} {next_x:.1f} {next_y:.0f}"
        x, y = next_x, next_y + BOX_HEIGHT
        if (next_x, next_y) != rest[-1]:
            path += f"V{y:.0f}"
    return path
