"""The loss plot is a small stand-alone SVG that shows the whole course of a training."""

import math
import re
from xml.etree import ElementTree

from vlmcore.report import loss_plot_svg


def rows(losses):
    return [
        {"step": step, "loss": loss, "learning_rate": 1e-3}
        for step, loss in enumerate(losses, start=1)
    ]


def points(svg: str, line: str) -> list[tuple[float, float]]:
    found = re.search(rf'class="lp-{line}" points="([^"]*)"', svg)
    return [tuple(map(float, pair.split(","))) for pair in found[1].split()]


def labels(svg: str) -> list[str]:
    tree = ElementTree.fromstring(svg)
    return ["".join(text.itertext()) for text in tree.iter("{http://www.w3.org/2000/svg}text")]


def test_a_falling_loss_falls_from_left_to_right():
    svg = loss_plot_svg(rows([3.0, 2.5, 2.0]), title="train.align")
    (left, top), _, (right, bottom) = points(svg, "raw")
    assert left < right
    assert top < bottom
    assert "train.align" in labels(svg)


def test_a_loss_that_spans_magnitudes_gets_a_log_axis_and_another_does_not():
    far = labels(loss_plot_svg(rows([4.0 * 0.9**i for i in range(60)]), title="x"))
    near = labels(loss_plot_svg(rows([4.0 - 0.01 * i for i in range(60)]), title="x"))
    assert any("log scale" in one for one in far)
    assert {"0.01", "0.1", "1"} <= set(far)
    assert not any("log scale" in one for one in near)
    assert {"0", "1", "2", "3", "4"} <= set(near)


def test_a_loss_that_is_not_finite_is_left_out_and_counted():
    svg = loss_plot_svg(rows([3.0, math.nan, math.inf, 2.0]), title="x")
    assert len(points(svg, "raw")) == 2
    assert any("2 steps without a finite loss" in one for one in labels(svg))
    assert "nan" not in svg


def test_the_held_out_loss_is_drawn_where_it_was_measured():
    metrics = rows([3.0, 2.5, 2.0, 1.5])
    metrics[1]["eval_loss"], metrics[3]["eval_loss"] = 4.0, 1.0
    svg = loss_plot_svg(metrics, title="x")
    loss, held_out = points(svg, "raw"), points(svg, "eval")
    assert [x for x, _ in held_out] == [loss[1][0], loss[3][0]]
    assert held_out[0][1] < loss[0][1] < loss[3][1] < held_out[1][1]  # its axis reaches both
    assert svg.count("<circle") == 2
    assert any("held-out loss" in one for one in labels(svg))
    assert "held-out" not in loss_plot_svg(rows([3.0, 2.0]), title="x")


def test_a_long_run_stays_small_and_keeps_its_spike():
    losses = [2.0] * 50_000
    losses[31_234] = 9.0
    svg = loss_plot_svg(rows(losses), title="x")
    assert len(svg) < 60_000
    heights = [y for _, y in points(svg, "raw")]
    assert min(heights) < heights[0] - 100


def test_few_steps_or_none_or_a_loss_of_zero_still_plot():
    for losses in ([], [2.0], [0.0, 0.0], [math.nan]):
        assert "learning rate" in " ".join(labels(loss_plot_svg(rows(losses), title="x")))


def test_a_title_is_escaped():
    assert "a <b> & c" in labels(loss_plot_svg(rows([1.0]), title="a <b> & c"))
