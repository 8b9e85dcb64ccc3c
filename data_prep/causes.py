"""Why a row cannot be used: the causes, an error that carries one, and their count."""

from collections import Counter
from dataclasses import dataclass, field

MAX_EXAMPLES = 3  # of each cause, kept in reports and messages

# Everything that a row can be left out for, in words for a reader of the audit.
CAUSES = {
    "bad_json": "the line is not JSON",
    "bad_row": "a field has another type than the format says, or is missing",
    "bad_role": "the turns are not [system] user assistant …",
    "bad_content": "a turn's content is no text that a tokenizer takes",
    "empty_answer": "an assistant turn says nothing",
    "tag_mismatch": "the text has more or fewer tags than there are images, videos or audios",
    "too_long": "the conversation has more characters than max_chars",
    "unsafe_path": "a file name leads out of the dataset",
    "missing_media": "a video or audio file is not there",
    "missing_image": "an image file is not there",
    "fetch_failed": "a URL gave no file within the limits",
    "bad_base64": "base64 text does not decode",
    "truncated_image": "an image ends before its pixels do",
    "corrupt_image": "an image does not decode",
    "corrupt_video": "a video does not decode",
    "corrupt_audio": "an audio file is of no known kind",
    "absurd_size": "an image is far longer than wide, or a file far too large",
    "decompression_bomb": "an image would unpack to more pixels than any model reads",
    "duplicate": "the same texts and media came before",
    "near_duplicate": "the same texts came before, with images that look the same",
    "not_one_question": "not one question about one image, as the holdout asks them",
}


class BadRowError(Exception):
    """A row that cannot be used: counted under `cause`, never raised to the user."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(cause, detail)
        assert cause in CAUSES, cause
        self.cause = cause
        self.detail = detail


@dataclass
class Dropped:
    """How many rows there were, and what became of those that could not be used."""

    num_rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.counts = Counter(self.counts)  # a plain dict where it was read from a file

    def add(self, where: str, error: BadRowError) -> None:
        """Count a bad row; the first few of each cause are remembered."""
        self.counts[error.cause] += 1
        examples = self.examples.setdefault(error.cause, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(f"{where} {error.detail}")

    def merge(self, later: "Dropped") -> None:
        """Add the rows that come after the ones counted here."""
        self.num_rows += later.num_rows
        self.counts.update(later.counts)
        for cause, examples in later.examples.items():
            mine = self.examples.setdefault(cause, [])
            mine.extend(examples[: MAX_EXAMPLES - len(mine)])

    @property
    def ratio(self) -> float:
        """Bad rows over all rows."""
        return self.counts.total() / max(1, self.num_rows)

    def describe(self) -> str:
        """The causes, worst first, with examples."""
        return "\n".join(
            f"  {count} x {cause}, as {'; '.join(self.examples[cause])}"
            for cause, count in self.counts.most_common()
        )
