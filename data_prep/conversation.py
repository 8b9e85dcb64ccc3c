"""The one shape that every format is read into, and what makes a conversation fit to train on."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from data_prep.causes import BadRowError

IMAGE_TAG = "<image>"
TAGS = {"images": IMAGE_TAG, "videos": "<video>", "audios": "<audio>"}
MAX_CHARS = 1_000_000  # about 250,000 tokens, more than any of these models reads

Media = str | bytes  # a path relative to the dataset's folder, a URL, base64 text, or the file


@dataclass(frozen=True)
class Conversation:
    """Turns of `{"role", "content"}`, and the media that their tags stand for, in order.

    `rejected` holds the same conversation with the answer that was not preferred.
    """

    messages: list[dict]
    media: Mapping[str, list[Media]] = field(default_factory=dict)  # by the keys of TAGS
    rejected: list[dict] | None = None


def check_conversation(conversation: Conversation, *, max_chars: int = MAX_CHARS) -> None:
    """Accept `[system] user assistant …` with texts, answers, and one tag a medium.

    A single assistant turn alone is text to be continued.

    Raises:
        BadRowError: `bad_role`, `bad_content`, `empty_answer`, `tag_mismatch` or `too_long`.
    """
    rejected = [] if conversation.rejected is None else [conversation.rejected]
    for messages in [conversation.messages, *rejected]:
        _check_roles([turn["role"] for turn in messages])
        for turn in messages:
            _check_content(turn["role"], turn["content"])
    contents = [turn["content"] for turn in conversation.messages]
    for kind, tag in TAGS.items():
        num_tags, num_media = count_tags(contents, tag), len(conversation.media.get(kind, []))
        if num_tags != num_media:
            raise BadRowError("tag_mismatch", f"{num_tags} {tag} for {num_media} {kind}")
    num_chars = sum(map(len, contents))
    if num_chars > max_chars:
        raise BadRowError("too_long", f"{num_chars} characters, max_chars is {max_chars}")


def count_tags(contents: Iterable[object], tag: str) -> int:
    """How often a tag stands in the texts."""
    return sum(content.count(tag) for content in contents if isinstance(content, str))


def _check_roles(roles: list) -> None:
    if not all(isinstance(role, str) for role in roles):
        raise BadRowError("bad_role", f"roles {roles} are not all text")
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if roles == ["assistant"]:
        return
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        shown = " ".join(roles[:6]) + (" …" if len(roles) > 6 else "")
        raise BadRowError("bad_role", f"roles {shown or 'none'} are not [system] user assistant …")


def _check_content(role: str, content: object) -> None:
    if not isinstance(content, str):
        raise BadRowError("bad_content", f"content of {role} is {type(content).__name__}, not text")
    if role == "assistant" and not content.strip():
        raise BadRowError("empty_answer", "an assistant turn has no text")
    try:
        content.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair: no tokenizer takes it
        raise BadRowError("bad_content", f"content of {role}: {error.reason}") from error
    if "\0" in content:
        raise BadRowError("bad_content", f"content of {role} holds a NUL")
