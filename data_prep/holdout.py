"""Raw test rows → question-and-answer records with their images, as an evaluation reads them."""

import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from data_prep.conversation import IMAGE_TAG, BadRowError
from data_prep.files import link_or_copy
from data_prep.formats import find_format
from data_prep.samples import Dropped, RawSample, read_samples, row_ranges
from vlmcore.errors import DataError

log = logging.getLogger(__name__)

RECORDS_NAME = "holdout.jsonl"


@dataclass
class HoldoutReport:
    """How many records there are, and how many rows were left out by cause."""

    num_records: int = 0
    dropped: dict[str, int] = field(default_factory=dict)


def write_holdout(
    raw_dir: Path,
    dest: Path,
    *,
    split: str = "test",
    limit: int | None = None,
    data_format: str = "messages",
) -> HoldoutReport:
    """Write `holdout.jsonl`, rows of {id, image, question, answer}, and `images/`.

    The rows that training would not take are left out here too, and those that are not one
    question about one image (`not_one_question`).

    Args:
        limit: stop after this many records; None takes all.

    Raises:
        DataError: the split is missing or has no such row.
    """
    table = raw_dir / f"{split}.jsonl"
    if not table.is_file():
        raise DataError(f"{table} is missing: a holdout needs the dataset's {split} split.")
    (dest / "images").mkdir(parents=True, exist_ok=True)
    dropped = Dropped()
    report = HoldoutReport()
    with (dest / RECORDS_NAME).open("w", encoding="utf-8") as file:
        for record in islice(_records(table, dest, data_format, dropped), limit):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            report.num_records += 1
    report.dropped = dict(sorted(dropped.counts.items()))
    if report.num_records == 0:
        raise DataError(
            f"{table} has no row that asks one question about one image.\n" + dropped.describe()
        )
    if report.dropped:
        log.warning("%s: rows left out of the holdout:\n%s", table, dropped.describe())
    return report


def _records(table: Path, dest: Path, data_format: str, dropped: Dropped) -> Iterator[dict]:
    parse = find_format(data_format)
    for rows in row_ranges(table, max_rows=sys.maxsize):
        for sample in read_samples(rows, parse=parse, dropped=dropped):
            try:
                yield _record(sample, dest)
            except BadRowError as error:
                dropped.add(sample.key, error)


def _record(sample: RawSample, dest: Path) -> dict:
    roles = [turn["role"] for turn in sample.messages]
    if roles != ["user", "assistant"] or len(sample.images) != 1:
        raise BadRowError("not_one_question", f"{len(sample.images)} images, roles {roles}")
    (image,) = sample.images
    question, answer = (turn["content"] for turn in sample.messages)
    name = f"images/{sample.key}.{image.extension}"
    link_or_copy(image.path, dest / name)
    return {
        "id": sample.key,
        "image": name,
        "question": question.replace(IMAGE_TAG, "").strip(),
        "answer": answer,
    }
