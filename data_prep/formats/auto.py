"""`auto`, `parquet` and `webdataset`: the format of a row told by the columns that it has."""

from data_prep.conversation import TAGS, Conversation
from data_prep.formats import alpaca, messages, query_response, sharegpt, text


def parse(row: dict) -> Conversation:
    """Read one row in the format that its columns speak of.

    Raises:
        BadRowError: as that format does.
    """
    if row.get("messages") is not None:
        return messages.parse(row)
    if row.get("conversations", row.get("conversation")) is not None:
        return sharegpt.parse(row)
    if row.get("instruction") is not None and row.get("output") is not None:
        return alpaca.parse(row)
    has_media = any(row.get(name) is not None for kind in TAGS for name in (kind, kind[:-1]))
    asked = any(row.get(name) is not None for name in query_response.QUERIES)
    if row.get("text") is not None and not asked and not has_media:
        return text.parse(row)
    return query_response.parse(row)
