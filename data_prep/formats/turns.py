"""Turns, however they are spelled, and the media fields beside them: what formats share."""

from collections.abc import Callable
from typing import Any

from data_prep.causes import BadRowError
from data_prep.conversation import TAGS, Media, count_tags

SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bard": "assistant", "bing": "assistant", "model": "assistant",
    "system": "system",
}  # fmt: skip
# OpenAI's names of a content part → which media it is; the part may hold the medium itself.
PARTS = {
    "image": "images", "image_url": "images", "input_image": "images",
    "video": "videos", "video_url": "videos",
    "audio": "audios", "audio_url": "audios", "input_audio": "audios",
}  # fmt: skip

TurnReader = Callable[[Any, dict[str, list[Media]]], dict]


def read_media_fields(row: dict) -> dict[str, list[Media]]:
    """`images` or `image`, `videos` or `video`, `audios` or `audio`: one medium, a list, or null.

    Raises:
        BadRowError: `bad_row` where one is none of a path, URL, base64 text, bytes, or an object
            with `bytes`, `path` or `url`.
    """
    found = {}
    for plural in TAGS:
        value = row.get(plural)
        value = row.get(plural[:-1]) if value is None else value
        listed = [] if value is None else value if isinstance(value, list) else [value]
        found[plural] = [_medium(one, plural) for one in listed]
    return found


def read_turns(value: object, read: TurnReader, media: dict[str, list[Media]]) -> list[dict]:
    """A list of turns; media that content parts hold are added to `media`.

    Raises:
        BadRowError: `bad_row` where it is no list of objects.
    """
    if value is None:
        raise BadRowError("bad_row", "it has no turns; format: auto goes by the columns it has")
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise BadRowError("bad_row", "the turns are not a list of objects")
    return [read(turn, media) for turn in value]


def openai_turn(turn: dict, media: dict[str, list[Media]]) -> dict:
    """`{"role", "content"}`, where content is text or a list of OpenAI's content parts."""
    content = turn.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, media) for part in content)
    return {"role": turn.get("role"), "content": content}


def sharegpt_turn(turn: dict, media: dict[str, list[Media]]) -> dict:
    """`{"from", "value"}`; a role that ShareGPT does not know stays as it is, to be refused."""
    role = turn.get("from")
    known = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    return {"role": known, "content": turn.get("value")}


def text_of(value: object) -> object:
    """A number as its text: columns of answers often hold them; everything else as it is."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number else value


def with_tags(messages: list[dict], media: dict[str, list[Media]]) -> list[dict]:
    """Tags put before the first user's text, for formats whose media stand in fields of their own.

    Media that have a tag already keep it where it is.
    """
    contents = [turn["content"] for turn in messages]
    missing = "".join(
        tag * len(media.get(kind, []))
        for kind, tag in TAGS.items()
        if not count_tags(contents, tag)
    )
    first = next((i for i, turn in enumerate(messages) if turn["role"] == "user"), None)
    if first is None or not missing or not isinstance(messages[first]["content"], str):
        return messages
    tagged = {**messages[first], "content": missing + messages[first]["content"]}
    return [*messages[:first], tagged, *messages[first + 1 :]]


def _part(part: object, media: dict[str, list[Media]]) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise BadRowError("bad_content", "a content part has no type")
    if kind in ("text", "input_text"):
        text = part.get("text")
        if not isinstance(text, str):
            raise BadRowError("bad_content", f"a text part holds {type(text).__name__}")
        return text
    if kind not in PARTS:
        raise BadRowError("bad_content", f"a content part is of type {kind!r}")
    plural = PARTS[kind]
    held = next((part[name] for name in (kind, plural[:-1], "url", "path") if part.get(name)), None)
    if held is not None:  # else the medium stands in the row's own field
        media[plural].append(_medium(held, plural))
    return TAGS[plural]


def _medium(value: object, plural: str) -> Media:
    if isinstance(value, dict):
        if isinstance(value.get("data"), str):  # OpenAI's input_audio: base64 of any kind of file
            return f"data:;base64,{value['data']}"
        value = next((value[name] for name in ("bytes", "path", "url") if value.get(name)), None)
    if isinstance(value, str | bytes):
        return value
    raise BadRowError("bad_row", f"{plural}: {type(value).__name__} is no path, URL or bytes")
