"""Conversations as text, with the stretches that carry loss: a chat template, or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from vlmcore.errors import DataError

IMAGE_TAG = "<image>"
VIDEO_TAG = "<video>"
TAGS = {IMAGE_TAG: "image", VIDEO_TAG: "video"}

Message = dict[str, Any]  # role, content, and loss_scale where it is not 1
LossScale = Literal["default", "last_round", "all"]
Part = dict[str, str]

_BEFORE, _AFTER = "\u2402", "\u2403"  # texts that no template looks at


@dataclass(frozen=True)
class Rendered:
    """A text in which each medium is one placeholder.

    Attributes:
        text: The whole conversation.
        spans: (start, end, weight) of the characters that carry loss.
    """

    text: str
    spans: list[tuple[int, int, float]]


class Renderer(Protocol):
    """Makes text of messages whose `<image>` and `<video>` tags stand for media."""

    def render(self, messages: Sequence[Message]) -> Rendered:
        """The text and what of it is trained."""
        ...


class ChatRenderer:
    """The tokenizer's chat template, with loss on assistant turns.

    Args:
        hf_dir: The tokenizer's folder, for messages.
        tokenizer: Holds the template.
        loss_scale: `default`: every assistant turn; `last_round`: the last one; `all`: all text.

    Raises:
        DataError: The tokenizer has no chat template.
    """

    def __init__(self, hf_dir: Path, tokenizer: Any, *, loss_scale: LossScale = "default") -> None:
        if not tokenizer.chat_template:
            raise DataError(
                f"{hf_dir}: the tokenizer has no chat template; add chat_template.jinja"
            )
        self.loss_scale = loss_scale
        self._template = _compiled(tokenizer.get_chat_template())
        self._names = tokenizer.special_tokens_map

    def render(self, messages: Sequence[Message]) -> Rendered:
        """The text and what of it is trained.

        Raises:
            DataError: The template is not prefix-stable.
        """
        turns = [
            {"role": message["role"], "content": _parts(message["content"])} for message in messages
        ]
        text = self._apply(turns)
        if self.loss_scale == "all":
            return Rendered(text, [(0, len(text), 1.0)])
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        if self.loss_scale == "last_round":
            answers = answers[-1:]
        spans = []
        for i in answers:
            before = self._apply(turns[:i], prompt=True)
            through = self._apply(turns[: i + 1]) if i + 1 < len(turns) else text
            if not (text.startswith(through) and through.startswith(before)):
                raise DataError(
                    "the chat template is not prefix-stable: a turn renders differently once "
                    "others follow it, so its tokens cannot be told apart; use another template"
                )
            # what follows the end-of-turn token (a newline) is never predicted
            weight = float(messages[i].get("loss_scale", 1.0))
            spans.append((len(before), len(through.rstrip()), weight))
        return Rendered(text, spans)

    def _apply(self, turns: Sequence[Any], *, prompt: bool = False) -> str:
        """As `apply_chat_template`, which takes as long again for each of its short texts."""
        variables = {"tools": None, "documents": None, "add_generation_prompt": prompt}
        return str(self._template.render(self._names, messages=turns, **variables))


class GenerativeRenderer:
    """The turns' texts one behind the other and the end-of-text token, all of it trained.

    An image stands between the tokens that the chat template puts around one.

    Args:
        tokenizer: Names the end of text; its template, where there is one, shows the tokens.
        placeholders: `image` and `video` → the token that stands for one.
    """

    def __init__(self, tokenizer: Any, placeholders: dict[str, str]) -> None:
        self.end = tokenizer.eos_token or ""
        self.markup = {
            tag: _markup(tokenizer, kind, placeholders[kind])
            for tag, kind in TAGS.items()
            if kind in placeholders
        }

    def render(self, messages: Sequence[Message]) -> Rendered:
        """The text and what of it is trained."""
        pieces, spans, length = [], [], 0
        for message in messages:
            piece = message["content"]
            for tag, markup in self.markup.items():
                piece = piece.replace(tag, markup)
            weight = float(message.get("loss_scale", 1.0))
            spans.append((length, length + len(piece), weight))
            length += len(piece)
            pieces.append(piece)
        spans.append((length, length + len(self.end), 1.0))
        return Rendered("".join(pieces) + self.end, spans)


def _parts(content: str) -> str | list[Part]:
    """Content whose tags are parts of their own, as chat templates want them."""
    parts: list[Part] = []
    rest = content
    while found := [(rest.find(tag), tag) for tag in TAGS if tag in rest]:
        start, tag = min(found)
        if start:
            parts.append({"type": "text", "text": rest[:start]})
        parts.append({"type": TAGS[tag]})
        rest = rest[start + len(tag) :]
    if not parts:
        return content
    return [*parts, {"type": "text", "text": rest}] if rest else parts


def _compiled(chat_template: str) -> Any:
    """A chat template as transformers 5.19 compiles it."""
    from transformers.utils.chat_template_utils import _cached_compile_jinja_template

    template: Any = _cached_compile_jinja_template(chat_template)
    template.globals = dict(template.globals)  # copied for each text, as a ChainMap slowly
    return template


def _markup(tokenizer: Any, kind: str, placeholder: str) -> str:
    if not tokenizer.chat_template:
        return placeholder
    parts = [{"type": "text", "text": _BEFORE}, {"type": kind}, {"type": "text", "text": _AFTER}]
    turn = {"role": "user", "content": parts}
    shown = str(tokenizer.apply_chat_template([turn], tokenize=False))
    markup = shown.partition(_BEFORE)[2].partition(_AFTER)[0].strip()
    # a template that moves media to the front shows nothing between the texts
    return markup if placeholder in markup else placeholder
