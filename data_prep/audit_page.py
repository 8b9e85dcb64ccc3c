"""An audit as values for a report, and as one HTML page that needs nothing beside itself."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from data_prep.audit import MAX_EXAMPLES, Audit
from data_prep.causes import CAUSES
from data_prep.images import DECODE_ERRORS

THUMBNAIL_PX = 240
MAX_TEXT_CHARS = 600
NUM_BARS = 24
WIDTH, HEIGHT, MARGIN = 420, 150, 26


@dataclass(frozen=True)
class Histogram:
    """Bars on a logarithmic axis: (x, y, height, from – to, count), in px of an SVG."""

    title: str
    bars: list[tuple[float, float, float, str, int]]
    bar_width: float
    ticks: list[tuple[float, str]]
    most: int


def describe(audit: Audit) -> dict[str, Any]:
    """What a page shows of an audit, as JSON values: plots drawn, pictures small, lists cut."""
    report = audit.report
    plotted = [
        ("Image width, pixels", [width for width, _ in audit.sizes]),
        ("Image height, pixels", [height for _, height in audit.sizes]),
        ("Tokens a sample", audit.num_tokens),
    ]
    return {
        "figures": audit.figures(),
        "num_rows": report.num_rows,
        "num_videos": report.num_videos,
        "dropped": [
            {"cause": cause, "means": CAUSES[cause], "rows": number,
             "examples": report.examples.get(cause, [])}
            for cause, number in sorted(report.dropped.items(), key=lambda item: -item[1])
        ],
        "leaks": [list(leak) for leak in audit.leaks[:MAX_EXAMPLES]],
        "num_duplicates": len(audit.duplicates),
        "duplicates": [
            [key, other, CAUSES[cause]]
            for key, (cause, other) in list(audit.duplicates.items())[:MAX_EXAMPLES]
        ],
        "turns": sorted(audit.num_turns.items()),
        "plots": [draw(histogram(title, values)) for title, values in plotted if values],
        "shown": [
            {
                "split": one.split,
                "key": one.key,
                "turns": [[turn["role"], _cut(turn["content"])] for turn in one.messages],
                "images": [thumbnail(data) for _, data in one.images],
            }
            for one in audit.shown
        ],
    }  # fmt: skip


def write_page(found: Mapping[str, Any], dest: Path, *, title: str) -> None:
    """Write the page of a described audit; equal audits give equal pages."""
    text = _environment().get_template("audit.html.jinja").render(title=title, audit=found)
    dest.write_text(text, encoding="utf-8")


def draw(histogram: Histogram) -> str:
    """A histogram as SVG that brings its own colours, for light pages and dark ones."""
    frame = {"width": WIDTH, "height": HEIGHT, "margin": MARGIN}
    template = _environment().get_template("histogram.svg.jinja")
    return template.render(one=histogram, frame=frame)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = "{:,}".format
    return environment


def histogram(title: str, values: Sequence[int]) -> Histogram:
    """How often values fall into steps that grow by a constant factor; 0 counts as 1."""
    positive = [max(1, value) for value in values]
    low, high = min(positive, default=1), max(positive, default=1)
    span = math.log(high + 1) - math.log(low) or 1.0

    def bar_of(value: int) -> int:
        return min(NUM_BARS - 1, int((math.log(value) - math.log(low)) / span * NUM_BARS))

    counts = [0] * NUM_BARS
    for value in positive:
        counts[bar_of(value)] += 1
    most = max(counts)
    step = (WIDTH - 2 * MARGIN) / NUM_BARS
    edges = [math.exp(math.log(low) + span * i / NUM_BARS) for i in range(NUM_BARS + 1)]
    room = HEIGHT - 2 * MARGIN
    bars = []
    for i, count in enumerate(counts):
        height = round(room * count / max(1, most), 1)
        words = f"{edges[i]:.0f} – {edges[i + 1]:.0f}"
        bars.append((round(MARGIN + i * step, 1), HEIGHT - MARGIN - height, height, words, count))
    places = {f"{edges[i]:.0f}": round(MARGIN + i * step, 1) for i in range(NUM_BARS, -1, -6)}
    ticks = [(place, label) for label, place in places.items()]
    return Histogram(title, bars, round(step - 1.5, 1), ticks, most)


def thumbnail(data: bytes) -> str:
    """An image made small, as a data URI; empty where it does not decode."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            small = image.convert("RGB")
            small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    except DECODE_ERRORS:
        return ""
    out = io.BytesIO()
    small.save(out, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT_CHARS else f"{text[:MAX_TEXT_CHARS]} …"
