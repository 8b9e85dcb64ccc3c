"""Raw test rows → question-and-answer records with their images, as an evaluation reads them."""

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from data_prep.causes import BadRowError, Dropped
from data_prep.conversation import IMAGE_TAG
from data_prep.files import link_or_copy
from data_prep.formats import RowFormat
from data_prep.rows import row_ranges
from data_prep.samples import RawSample, RowReader, read_samples
from data_prep.shards import read_report
from data_prep.tables import find_tables
from vlmcore.errors import DataError

log = logging.getLogger(__name__)

RECORDS_NAME = "holdout.jsonl"
MAX_ROWS = 10_000  # looked for at once


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
    reader: RowReader | None = None,
    tables: dict[str, list[Path]] | None = None,
) -> HoldoutReport:
    """Write `holdout.jsonl`, rows of {id, image, question, answer}, and `images/`.

    The rows that training would not take are left out here too, and those that are not one
    question about one image (`not_one_question`).

    Args:
        limit: stop after this many records; None takes all.
        reader: how rows are read; None: the `messages` format, images beside the tables.
        tables: split → files of rows; None: those that `raw_dir` holds.

    Raises:
        DataError: the split is missing or has no such row.
    """
    files = (tables or find_tables(raw_dir)).get(split)
    if not files:
        raise DataError(f"{raw_dir} has no {split} split: a holdout needs one.")
    (dest / "images").mkdir(parents=True, exist_ok=True)
    dropped = Dropped()
    report = HoldoutReport()
    with (dest / RECORDS_NAME).open("w", encoding="utf-8") as file:
        for record in islice(_records(files, dest, reader or RowReader(raw_dir), dropped), limit):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            report.num_records += 1
    report.dropped = dict(sorted(dropped.counts.items()))
    if report.num_records == 0:
        raise DataError(
            f"{raw_dir}: {split} has no row that asks one question about one image.\n"
            + dropped.describe()
        )
    if report.dropped:
        log.warning("%s: rows left out of the holdout:\n%s", raw_dir, dropped.describe())
    return report


def write_holdout_of_shards(
    shards_dir: Path, dest: Path, *, split: str = "test", limit: int | None = None
) -> HoldoutReport:
    """The same of a split of finished shards.

    Raises:
        DataError: the split is missing or has no such sample.
    """
    shards = read_report(shards_dir).shards
    return write_holdout(
        shards_dir,
        dest,
        split=split,
        limit=limit,
        reader=RowReader(shards_dir, RowFormat("webdataset")),
        tables={name: [shards_dir / tar for tar in tars] for name, tars in shards.items()},
    )


def _records(files: list[Path], dest: Path, reader: RowReader, dropped: Dropped) -> Iterator[dict]:
    for index, file in enumerate(files):
        prefix = file.stem if len(files) == 1 else f"{index:03d}-{file.stem}"
        prefix = re.sub(r"[^A-Za-z0-9_-]", "_", prefix)
        for rows in row_ranges(file, key_prefix=prefix, max_rows=MAX_ROWS):
            for number, sample in read_samples(rows, reader):
                dropped.num_rows += 1
                try:
                    if isinstance(sample, BadRowError):
                        raise sample
                    yield _record(sample, dest)
                except BadRowError as error:
                    dropped.add(f"{file.name}:{number}", error)


def _record(sample: RawSample, dest: Path) -> dict:
    roles = [turn["role"] for turn in sample.messages]
    if roles != ["user", "assistant"] or len(sample.images) != 1 or sample.videos:
        raise BadRowError("not_one_question", f"{len(sample.images)} images, roles {roles}")
    (image,) = sample.images
    question, answer = (turn["content"] for turn in sample.messages)
    name = f"images/{sample.key}.{image.extension}"
    if image.path is not None:
        link_or_copy(Path(image.path), dest / name)
    else:
        (dest / name).write_bytes(image.data)
    return {
        "id": sample.key,
        "image": name,
        "question": question.replace(IMAGE_TAG, "").strip(),
        "answer": answer,
    }
