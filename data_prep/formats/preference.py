"""Preference data: which answer was chosen and which was rejected, in any of the usual spellings.

`rejected_response` (text), `rejected_messages` (turns), or TRL's `chosen` and `rejected`, each a
text, a turn, or turns with or without the question before them.
"""

from data_prep.causes import BadRowError
from data_prep.formats.turns import openai_turn, sharegpt_turn


def with_chosen(row: dict) -> dict:
    """The row with its chosen answer as the conversation; unchanged where it has none as turns."""
    chosen = _turns(row.get("chosen"))
    if chosen is None:
        return row
    before = _turns(row.get("prompt", row.get("messages", row.get("conversations")))) or []
    if isinstance(row.get("prompt"), str):
        before = [{"role": "user", "content": row["prompt"]}]
    if len(chosen) > 1:  # the whole conversation
        before = []
    rest = {key: row[key] for key in row if key not in ("conversations", "prompt", "chosen")}
    return {**rest, "messages": [*before, *chosen]}


def rejected_messages(row: dict, messages: list[dict]) -> list[dict] | None:
    """The conversation as it was not preferred; None where the row holds no preference.

    Raises:
        BadRowError: `bad_row` where it is neither text nor turns.
    """
    names = ("rejected_messages", "rejected_response", "rejected")
    value = next((row[name] for name in names if row.get(name) is not None), None)
    if value is None:
        return None
    if isinstance(value, str):
        return [*messages[:-1], {"role": "assistant", "content": value}]
    turns = _turns(value)
    if turns is None:
        raise BadRowError("bad_row", f"what was rejected is {type(value).__name__}")
    return turns if len(turns) > 1 else [*messages[:-1], *turns]


def _turns(value: object) -> list[dict] | None:
    listed = [value] if isinstance(value, dict) else value
    if not isinstance(listed, list) or not all(isinstance(turn, dict) for turn in listed):
        return None
    return [(sharegpt_turn if "from" in turn else openai_turn)(turn, {}) for turn in listed]
