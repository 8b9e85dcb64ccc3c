"""`text`: {"text": "…"}, to learn to continue (task `pt`); media stand where its tags are."""

from data_prep.causes import BadRowError
from data_prep.conversation import Conversation
from data_prep.formats.turns import read_media_fields


def parse(row: dict) -> Conversation:
    """Read one row as an assistant turn without a question.

    Raises:
        BadRowError: `bad_row` where there is no text.
    """
    if row.get("text") is None:
        raise BadRowError("bad_row", "'text' is missing")
    messages = [{"role": "assistant", "content": row["text"]}]
    return Conversation(messages, read_media_fields(row))
