"""Rows of a JSONL file, each read into a sample fit to train on, or counted with its cause."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from data_prep.conversation import BadRowError, Conversation, check_conversation
from data_prep.images import EncodedImage, read_image

MAX_EXAMPLES = 3  # of each cause, kept in reports and messages


@dataclass(frozen=True)
class RawSample:
    """A conversation that passed every check.

    `key` is `{split}-{line number}`: unique without trusting the ids of the source, free of the
    dots and slashes that a shard cannot hold, and it leads back to the row.
    """

    key: str
    messages: list[dict]
    images: list[EncodedImage]


@dataclass
class Dropped:
    """How many rows there were, and what became of those that could not be used."""

    num_rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

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


@dataclass(frozen=True)
class RowRange:
    """Some consecutive lines of a split's JSONL file, found again by byte offset."""

    table: Path
    offset: int
    first_line: int  # counted from 1, as editors do
    num_lines: int


def row_ranges(table: Path, *, max_rows: int) -> Iterator[RowRange]:
    """Cut a JSONL file into ranges of at most `max_rows` lines, without holding them."""
    first_line = 1
    with table.open("rb") as file:
        while True:
            offset = file.tell()
            num_lines = sum(1 for _ in islice(iter(file.readline, b""), max_rows))
            if num_lines == 0:
                return
            yield RowRange(table, offset=offset, first_line=first_line, num_lines=num_lines)
            first_line += num_lines


def read_samples(
    rows: RowRange, *, parse: Callable[[dict], Conversation], dropped: Dropped
) -> Iterator[RawSample]:
    """Yield the usable samples in order; the others, and the number of rows, go to `dropped`.

    Images are looked for beside the JSONL file. Blank lines are no rows.
    """
    with rows.table.open("rb") as file:
        file.seek(rows.offset)
        for line_number in range(rows.first_line, rows.first_line + rows.num_lines):
            line = file.readline()
            if not line.strip():
                continue
            dropped.num_rows += 1
            try:
                messages, images = _read_row(line, root=rows.table.parent, parse=parse)
            except BadRowError as error:
                dropped.add(f"{rows.table.name}:{line_number}", error)
            else:
                yield RawSample(f"{rows.table.stem}-{line_number:06d}", messages, images)


def _read_row(
    line: bytes, *, root: Path, parse: Callable[[dict], Conversation]
) -> tuple[list[dict], list[EncodedImage]]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: also bytes that are not UTF-8
        raise BadRowError("bad_json", str(error)) from error
    if not isinstance(row, dict):
        raise BadRowError("bad_row", f"a {type(row).__name__}, not an object")
    conversation = parse(row)
    check_conversation(conversation)
    return conversation.messages, [read_image(root, name) for name in conversation.images]
