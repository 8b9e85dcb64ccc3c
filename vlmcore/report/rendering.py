"""Templates to text, and how figures are spelled in them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

_MAX_ANSWER_CHARS = 400


def render(template: str, **values: Any) -> str:
    """A template of `templates/` filled in; every value is escaped."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "duration": duration,
        "count": count,
        "figure": figure,
        "percent": percent,
        "score": score,
        "answer": answer,
        "pretty": pretty,
    }
    return environment


def duration(seconds: float) -> str:
    """Such as `0.4 s`, `12 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def count(number: float) -> str:
    """Such as `12,345`."""
    return f"{number:,.0f}"


def figure(number: float) -> str:
    """A measured value with three digits, such as `4.8e-07`; an exact zero stays `0`."""
    return f"{number:.3g}"


def percent(share: float) -> str:
    """A share (0 to 1), such as `97.2 %`."""
    return f"{100 * share:.1f} %"


def score(value: float, metric: str) -> str:
    """A score as its metric is spoken of: shares of right answers in percent."""
    is_share = metric.rpartition(".")[2] in {"exact_match", "acc", "accuracy"}
    return percent(value) if is_share else f"{value:.4g}"


def answer(text: str) -> str:
    """What a model said, cut where it goes on and on."""
    text = text.strip() or "(nothing)"
    return text if len(text) <= _MAX_ANSWER_CHARS else f"{text[:_MAX_ANSWER_CHARS]} …"


def pretty(value: Any) -> str:
    """Parameters as indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False)
