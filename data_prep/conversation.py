"""The one shape that every format is read into, and what makes a conversation fit to train on."""

from dataclasses import dataclass

IMAGE_TAG = "<image>"


class BadRowError(Exception):
    """A row that cannot be used: counted under `cause`, never raised to the user."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(cause, detail)
        self.cause = cause
        self.detail = detail


@dataclass(frozen=True)
class Conversation:
    """Turns of `{"role", "content"}`, and the images that their tags stand for, in order."""

    messages: list[dict]
    images: list[str]  # paths relative to the dataset's folder


def check_conversation(conversation: Conversation) -> None:
    """Accept `[system] user assistant …` with texts, answers, and one tag an image.

    Raises:
        BadRowError: `bad_role`, `bad_content`, `empty_answer` or `tag_mismatch`.
    """
    roles = [turn["role"] for turn in conversation.messages]
    _check_roles(roles)
    for turn in conversation.messages:
        _check_content(turn["role"], turn["content"])
    num_tags = sum(turn["content"].count(IMAGE_TAG) for turn in conversation.messages)
    if num_tags != len(conversation.images):
        raise BadRowError("tag_mismatch", f"{num_tags} {IMAGE_TAG} for {len(conversation.images)}")


def _check_roles(roles: list) -> None:
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise BadRowError("bad_role", f"roles {roles} are not [system] user assistant …")


def _check_content(role: str, content: object) -> None:
    if not isinstance(content, str):
        raise BadRowError("bad_content", f"content of {role} is {type(content).__name__}, not text")
    if role == "assistant" and not content.strip():
        raise BadRowError("empty_answer", "an assistant turn has no text")
    try:
        content.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair: no tokenizer takes it
        raise BadRowError("bad_content", f"content of {role}: {error.reason}") from error
