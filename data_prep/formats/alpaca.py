"""`alpaca`: {"instruction": "Translate.", "input": "Katze", "output": "cat"}."""

from data_prep.causes import BadRowError
from data_prep.conversation import Conversation
from data_prep.formats.query_response import question_and_answer


def parse(row: dict) -> Conversation:
    """Read one row; `input` may be missing or empty, `system` and `history` may stand beside it.

    Raises:
        BadRowError: `bad_row` where instruction or output are missing.
    """
    for name in ("instruction", "output"):
        if row.get(name) is None:
            raise BadRowError("bad_row", f"{name!r} is missing")
    query = row["instruction"]
    if isinstance(query, str) and isinstance(row.get("input"), str) and row["input"]:
        query = f"{query}\n{row['input']}"
    return question_and_answer(row, query=query, response=row["output"])
