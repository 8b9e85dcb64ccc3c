"""Placeholders filled with what the processor puts there, without a text of thousands of them.

A placeholder is a special token, which a tokenizer splits off whatever stands beside it. So a run
of a thousand gives the same tokens as one that is repeated after tokenising.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

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
    of_kind = {
        "image": [medium for medium in media if medium.video is None],
        "video": [medium for medium in media if medium.video is not None],
    }
    waiting = {token: iter(of_kind[kind]) for kind, token in placeholders.items()}
    filled = Filled()
    starts, shifts = [0], [0]  # from a character of the rendered text on: how much further it is
    pieces, done, length = [], 0, 0
    for match in _pattern(tuple(placeholders.values())).finditer(rendered.text):
        medium = next(waiting[match.group()], None)
        if medium is None:
            return None
        short, repeats = _collapsed(medium.replacement, tuple(feature_tokens))
        filled.repeats += repeats
        pieces += [rendered.text[done : match.start()], short]
        length += match.start() - done
        filled.blocks.append((length, length + len(short)))
        filled.media.append(medium)
        length += len(short)
        done = match.end()
        starts.append(done)
        shifts.append(length - done)
    if len(filled.media) < len(media):
        return None
    filled.text = "".join([*pieces, rendered.text[done:]])

    def shifted(character: int) -> int:
        return character + shifts[bisect_right(starts, character) - 1]

    filled.spans = [(shifted(start), shifted(end), weight) for start, end, weight in rendered.spans]
    return filled


@lru_cache
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


@lru_cache
def _collapsed(replacement: str, feature_tokens: tuple[str, ...]) -> tuple[str, list[int]]:
    """The replacement with each run of a feature token written once, and their lengths."""
    repeats = []

    def once(run: re.Match[str]) -> str:
        token = next(token for token in feature_tokens if run.group().startswith(token))
        repeats.append(len(run.group()) // len(token))
        return token

    runs = "|".join(f"(?:{re.escape(token)})+" for token in feature_tokens)
    return re.sub(runs, once, replacement), repeats
