"""`sharegpt` and `llava`: turns under `conversations`, media in fields beside them.

{"conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                   {"from": "gpt", "value": "A cat."}], "image": "00012/000123456.jpg"}
"""

from data_prep.conversation import Conversation
from data_prep.formats.turns import read_media_fields, read_turns, sharegpt_turn


def parse(row: dict) -> Conversation:
    """Read one row; a `system` field becomes the first turn.

    Raises:
        BadRowError: `bad_row` where a field has another type than the format says.
    """
    media = read_media_fields(row)
    turns = row.get("conversations", row.get("conversation"))
    messages = read_turns(turns, sharegpt_turn, media)
    if row.get("system") is not None:
        messages = [{"role": "system", "content": row["system"]}, *messages]
    return Conversation(messages, media)
