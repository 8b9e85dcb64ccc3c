"""`messages`: ms-swift's and OpenAI's rows.

{"messages": [{"role": "user", "content": "<image>What is it?"},
              {"role": "assistant", "content": "A cat."}], "images": ["images/cat.png"]}

A content may also be a list of OpenAI's parts; their media come after those of the row's fields.
"""

from data_prep.conversation import Conversation
from data_prep.formats.turns import openai_turn, read_media_fields, read_turns


def parse(row: dict) -> Conversation:
    """Read one row; `images`, `videos` and `audios` may be missing or null.

    Raises:
        BadRowError: `bad_row` or `bad_content` where a field has another type than it should.
    """
    media = read_media_fields(row)
    return Conversation(read_turns(row.get("messages"), openai_turn, media), media)
