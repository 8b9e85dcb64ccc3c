"""An audit as one HTML page that needs nothing beside itself."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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


def write_page(audit: Audit, dest: Path, *, title: str) -> None:
    """Write the page of an audit; equal audits give equal pages."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("audit.html.jinja").render(
        title=title,
        audit=audit,
        figures=audit.figures(),
        causes=CAUSES,
        histograms=[
            histogram("Image width, pixels", [width for width, _ in audit.sizes]),
            histogram("Image height, pixels", [height for _, height in audit.sizes]),
            histogram("Tokens a sample", audit.num_tokens),
        ],
        frame={"width": WIDTH, "height": HEIGHT, "margin": MARGIN},
        max_examples=MAX_EXAMPLES,
        shown=[
            {
                "split": one.split,
                "key": one.key,
                "turns": [(turn["role"], _cut(turn["content"])) for turn in one.messages],
                "images": [thumbnail(data) for _, data in one.images],
            }
            for one in audit.shown
        ],
    )
    dest.write_text(text, encoding="utf-8")


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
    ticks = [(round(MARGIN + i * step, 1), f"{edges[i]:.0f}") for i in range(0, NUM_BARS + 1, 6)]
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
