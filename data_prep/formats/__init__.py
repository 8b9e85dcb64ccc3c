"""How a source's rows are written: one file a format, each a function from row to conversation.

A format only translates. What every conversation must satisfy is checked once, in `samples.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from data_prep.causes import BadRowError
from data_prep.conversation import Conversation
from data_prep.formats import alpaca, auto, messages, preference, query_response, sharegpt, text
from vlmcore.errors import DataError

Parse = Callable[[dict], Conversation]

FORMATS: dict[str, Parse] = {
    "alpaca": alpaca.parse,
    "auto": auto.parse,
    "llava": sharegpt.parse,
    "messages": messages.parse,
    "parquet": auto.parse,
    "query_response": query_response.parse,
    "sharegpt": sharegpt.parse,
    "text": text.parse,
    "webdataset": auto.parse,
}


@dataclass(frozen=True)
class RowFormat:
    """How rows are read.

    Attributes:
        name: one of FORMATS.
        columns: the source's column → the name that the format knows it by, as ms-swift spells it.
        prompt: the question put to rows that have none.
    """

    name: str = "messages"
    columns: Mapping[str, str] = field(default_factory=dict)
    prompt: str | None = None

    def __post_init__(self) -> None:
        if self.name not in FORMATS:
            known = ", ".join(sorted(FORMATS))
            raise DataError(f"data format {self.name!r} is not known. Expected one of {known}.")

    def parse(self, row: dict) -> Conversation:
        """Read one row.

        Raises:
            BadRowError: `bad_row`, `bad_content`: fields are missing or of another type.
        """
        row = self._renamed(row)
        chosen = preference.chosen_row(row)
        conversation = FORMATS[self.name](row) if chosen is None else messages.parse(chosen)
        rejected = preference.rejected_messages(row, conversation.messages)
        return replace(conversation, rejected=rejected) if rejected else conversation

    def _renamed(self, row: dict) -> dict:
        if not self.columns and self.prompt is None:
            return row
        missing = sorted(set(self.columns) - set(row))
        if missing:
            raise BadRowError("bad_row", f"no column {', '.join(missing)}")
        named = {key: row[key] for key in row if key not in self.columns}
        named |= {self.columns[key]: row[key] for key in self.columns}
        if self.prompt is not None and not any(named.get(key) for key in query_response.QUERIES):
            named["query"] = self.prompt
        return named
