"""How a source's rows are written: one file a format, each a function from row to conversation.

A format only translates. What every conversation must satisfy is checked once, in `samples.py`.
"""

from collections.abc import Callable

from data_prep.conversation import Conversation
from data_prep.formats import messages
from vlmcore.errors import DataError

FORMATS: dict[str, Callable[[dict], Conversation]] = {"messages": messages.parse}


def find_format(name: str) -> Callable[[dict], Conversation]:
    """The function that parses one row of format `name`.

    Raises:
        DataError: there is no such format.
    """
    if name not in FORMATS:
        known = ", ".join(sorted(FORMATS))
        raise DataError(f"data format {name!r} is not known. Expected one of {known}.")
    return FORMATS[name]
