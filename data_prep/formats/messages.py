"""`messages`: ms-swift's and OpenAI's rows.

{"messages": [{"role": "user", "content": "<image>What is it?"},
              {"role": "assistant", "content": "A cat."}], "images": ["images/cat.png"]}
"""

from data_prep.conversation import BadRowError, Conversation


def parse(row: dict) -> Conversation:
    """Read one row; `images` may be missing or null for text alone.

    Raises:
        BadRowError: `bad_row` where a field has another type than the format says.
    """
    messages = row.get("messages")
    images = row.get("images") or []
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise BadRowError("bad_row", "'messages' is not a list of objects")
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise BadRowError("bad_row", "'images' is not a list of paths")
    turns = [{"role": turn.get("role"), "content": turn.get("content")} for turn in messages]
    return Conversation(messages=turns, images=images)
