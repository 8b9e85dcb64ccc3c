"""Placeholders filled with what the processor puts there, without a text of thousands of them.

A placeholder is a special token, which a tokenizer splits off whatever stands beside it. So a run
of a thousand gives the same tokens as one that is repeated after tokenising.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from vlmcore.dataloading.media import Medium
from vlmcore.dataloading.rendering import Rendered


@dataclass
class Filled:
    """A text whose placeholders are filled, runs of a feature's token written once.

    Attributes:
        text: To be tokenised.
        spans: (start, end, weight) of its characters that carry loss.
        repeats: How often the feature tokens stand there really, one by one.
        blocks: (start, end) of each medium's characters.
        media: In the order of the text.
    """

    text: str = ""
    spans: list[tuple[int, int, float]] = field(default_factory=list)
    repeats: list[int] = field(default_factory=list)
    blocks: list[tuple[int, int]] = field(default_factory=list)
    media: list[Medium] = field(default_factory=list)


def fill(
    rendered: Rendered,
    media: Sequence[Medium],
    *,
    placeholders: Mapping[str, str],
    feature_tokens: Sequence[str],
) -> Filled | None:
    """The text with every placeholder filled; None where placeholders and media do not match.

    Args:
        rendered: One placeholder a medium.
        media: In the order of the conversation; a template may move images before videos.
        placeholders: `image` and `video` → its placeholder.
        feature_tokens: Tokens that stand for one feature each.
    """
    waiting = {
        "image": [medium for medium in media if medium.video is None],
        "video": [medium for medium in media if medium.video is not None],
    }
    filled = Filled()
    shifts = [(0, 0)]  # (character of the rendered text, how much further on it now stands)
    pieces, done, length = [], 0, 0
    for match in _pattern(list(placeholders.values())).finditer(rendered.text):
        kind = next(kind for kind, token in placeholders.items() if token == match.group())
        if not waiting[kind]:
            return None
        medium = waiting[kind].pop(0)
        short = _collapse(medium.replacement, feature_tokens, filled.repeats)
        pieces += [rendered.text[done : match.start()], short]
        length += match.start() - done
        filled.blocks.append((length, length + len(short)))
        filled.media.append(medium)
        length += len(short)
        done = match.end()
        shifts.append((done, length - done))
    if any(waiting.values()):
        return None
    filled.text = "".join([*pieces, rendered.text[done:]])
    filled.spans = [
        (_shifted(start, shifts), _shifted(end, shifts), weight)
        for start, end, weight in rendered.spans
    ]
    return filled


def _pattern(tokens: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


def _collapse(replacement: str, feature_tokens: Sequence[str], repeats: list[int]) -> str:
    """The replacement with each run of a feature token written once; their lengths are added."""
    runs = "|".join(f"(?:{re.escape(token)})+" for token in feature_tokens)

    def once(run: re.Match[str]) -> str:
        token = next(token for token in feature_tokens if run.group().startswith(token))
        repeats.append(len(run.group()) // len(token))
        return token

    return re.sub(runs, once, replacement)


def _shifted(character: int, shifts: Sequence[tuple[int, int]]) -> int:
    index = int(np.searchsorted([start for start, _ in shifts], character, side="right")) - 1
    return character + shifts[index][1]
