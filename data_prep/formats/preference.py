"""Preference data: which answer was chosen and which was rejected, in any of the usual spellings.

`rejected_response` (text), `rejected_messages` (turns), or TRL's `chosen` and `rejected`, each a
text, a turn, or turns with or without the question before them.
"""

from collections import defaultdict

from data_prep.causes import BadRowError
from data_prep.conversation import Media
from data_prep.formats.turns import openai_turn, sharegpt_turn

_BEFORE = ("prompt", "messages", "conversations")  # what was asked, where `chosen` is one turn


def chosen_row(row: dict) -> dict | None:
    """The row in the `messages` format, ending with its chosen answer; None if that is no turns."""
    chosen = _turns(row.get("chosen"))
    if chosen is None:
        return None
    asked = next((row[name] for name in _BEFORE if row.get(name) is not None), None)
    before = [{"role": "user", "content": asked}] if isinstance(asked, str) else _turns(asked) or []
    if len(chosen) > 1:  # the whole conversation
        before = []
    return {**row, "messages": [*before, *chosen]}


def rejected_messages(row: dict, messages: list[dict]) -> list[dict] | None:
    """The conversation as it was not preferred; None where the row holds no preference.

    Raises:
        BadRowError: `bad_row` where it is neither text nor turns, `bad_content` as `openai_turn`.
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
    shared: dict[str, list[Media]] = defaultdict(list)  # the media are those of what was chosen
    turns = [openai_turn(turn, shared) for turn in turns]
    return turns if len(turns) > 1 else [*messages[:-1], *turns]


def _turns(value: object) -> list[dict] | None:
    """Turns of either spelling as OpenAI's, their contents as they stand."""
    listed = [value] if isinstance(value, dict) else value
    if not isinstance(listed, list) or not all(isinstance(turn, dict) for turn in listed):
        return None
    return [sharegpt_turn(turn, {}) if "from" in turn else turn for turn in listed]
