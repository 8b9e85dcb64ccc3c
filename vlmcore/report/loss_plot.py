"""The loss curve of a training stage, with its learning rate, as one SVG that follows the theme."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmcore.report.rendering import render

WIDTH, HEIGHT = 760, 280
LEFT, RIGHT, TOP, BOTTOM = 52, 708, 34, 244
_MAX_POINTS = 800  # more than that no screen shows, and the page would grow with the run
_LOG_RATIO = 20  # the loss that matters is near 0 where a linear axis shows nothing

Line = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """Maps values to px."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value; what lies beyond the axis is put on its end."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        share = (self._scaled(min(max(value, self.low), self.high)) - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 1)

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def ticks(self, count: int = 5, *, least: float = 0.0) -> list[tuple[float, str]]:
        """Round values along the axis, at least `least` apart: place and label."""
        if self.log:
            values = _log_ticks(self.low, self.high)
        else:
            values = _linear_ticks(self.low, self.high, max((self.high - self.low) / count, least))
        return [(self(value), f"{value:g}") for value in values]


def loss_plot_svg(metrics: Sequence[Mapping[str, Any]], *, title: str) -> str:
    """Loss (left axis) and learning rate (right axis) over the steps, as a stand-alone SVG.

    Args:
        metrics: The lines of metrics.jsonl: `step`, `loss`, `learning_rate`, and `eval_loss` where
            held-out data were looked at. A loss that is not finite is left out and counted below
            the axis.
    """
    losses = [(row["step"], row["loss"]) for row in metrics if math.isfinite(row["loss"])]
    held_out = [
        (row["step"], row["eval_loss"])
        for row in metrics
        if math.isfinite(row.get("eval_loss", math.nan))
    ]
    rates = [(row["step"], row["learning_rate"]) for row in metrics]
    window = max(1, len(losses) // 40)
    smooth = _smoothed(losses, window=window)
    before_first = min((step for step, _ in rates), default=1) - 1
    x = Axis(before_first, _above([step for step, _ in rates]), LEFT, RIGHT)
    loss_axis = _loss_axis(
        [loss for _, loss in [*losses, *held_out]], [loss for _, loss in [*smooth, *held_out]]
    )
    rate_axis = Axis(0, _above([rate for _, rate in rates]) * 1.08, BOTTOM, TOP)
    return render(
        "loss_plot.svg.jinja",
        title=title,
        frame={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT},
        top=TOP,
        bottom=BOTTOM,
        x_ticks=x.ticks(8, least=1),
        loss_ticks=loss_axis.ticks(),
        rate_ticks=rate_axis.ticks(3),
        log=loss_axis.log,
        window=window,
        num_steps=len(rates),
        num_bad=len(metrics) - len(losses),
        raw=_points(_thinned(losses), x, loss_axis),
        smooth=_points(_thinned(smooth), x, loss_axis),
        rate=_points(_thinned(rates), x, rate_axis),
        held_out=[(x(step), loss_axis(loss)) for step, loss in _thinned(held_out)],
    )


def _loss_axis(losses: Sequence[float], smooth: Sequence[float]) -> Axis:
    top = _above(losses)
    floor = min(smooth, default=0.0) / 2
    if floor > 0 and top / floor > _LOG_RATIO:
        return Axis(floor, top * 1.2, BOTTOM, TOP, log=True)
    return Axis(min(0.0, *losses, 0.0), top * 1.05, BOTTOM, TOP)


def _above(values: Sequence[float]) -> float:
    """The largest value, or 1 where that would leave an axis without length."""
    return max([value for value in values if value > 0], default=1.0)


def _smoothed(line: Line, *, window: int) -> list[tuple[float, float]]:
    """The exponential moving average over about `window` steps, without a bias at the start."""
    keep = 1 - 1 / window
    total = weight = 0.0
    smooth = []
    for step, value in line:
        total, weight = total * keep + value, weight * keep + 1
        smooth.append((step, total / weight))
    return smooth


def _thinned(line: Line) -> Line:
    """The line, or of a long one the lowest and highest point of each stretch, in order."""
    if len(line) <= _MAX_POINTS:
        return line
    size = math.ceil(len(line) / (_MAX_POINTS // 2))
    thin: list[tuple[float, float]] = []
    for start in range(0, len(line), size):
        stretch = line[start : start + size]
        ends = {min(stretch, key=_value), max(stretch, key=_value)}
        thin += sorted(ends)
    return thin


def _value(point: tuple[float, float]) -> float:
    return point[1]


def _points(line: Line, x: Axis, y: Axis) -> str:
    return " ".join(f"{x(step):g},{y(value):g}" for step, value in line)


def _linear_ticks(low: float, high: float, rough: float) -> list[float]:
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step)
    # rounded: 3 × 0.1 would be labelled 0.30000000000000004
    return [round(i * step, 12) for i in range(first, math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 4 else (1,)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]
