"""`query_response`: a question and an answer in two columns, `history` before them.

{"query": "What is it?", "response": "A cat.", "images": ["cat.png"], "history": [["Hi", "Hello."]]}
"""

from data_prep.causes import BadRowError
from data_prep.conversation import Conversation
from data_prep.formats.turns import read_media_fields, text_of, with_tags

# Names under which published datasets keep the two; the first that a row has is taken.
QUERIES = ("query", "question", "prompt", "problem", "instruction", "input")
RESPONSES = (
    "response", "answer", "output", "completion", "solution", "caption", "target", "chosen", "text",
)  # fmt: skip


def parse(row: dict) -> Conversation:
    """Read one row; without a question, the images alone are what is asked.

    Raises:
        BadRowError: `bad_row` where there is no answer, or history is no list of pairs.
    """
    query = next((row[name] for name in QUERIES if row.get(name) is not None), "")
    response = next((row[name] for name in RESPONSES if row.get(name) is not None), None)
    if response is None:
        raise BadRowError("bad_row", f"no answer under any of {', '.join(RESPONSES)}")
    return question_and_answer(row, query=query, response=response)


def question_and_answer(row: dict, *, query: object, response: object) -> Conversation:
    """The conversation of a row's question, answer, `system`, `history` and media.

    Raises:
        BadRowError: `bad_row` where history is no list of pairs.
    """
    media = read_media_fields(row)
    pairs = [*_history(row.get("history")), (text_of(query), text_of(response))]
    messages = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    if row.get("system") is not None:
        messages = [{"role": "system", "content": row["system"]}, *messages]
    return Conversation(with_tags(messages, media), media)


def _history(value: object) -> list:
    pairs = [] if value is None else value
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in pairs
    ):
        raise BadRowError("bad_row", "'history' is not a list of [question, answer]")
    return pairs
