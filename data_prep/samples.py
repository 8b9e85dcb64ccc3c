"""Rows of a table, each read into a sample fit to train on, or into the cause why it is not."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.causes import BadRowError
from data_prep.conversation import MAX_CHARS, TAGS, check_conversation
from data_prep.formats import RowFormat
from data_prep.images import check_image
from data_prep.media import describe_media, read_media
from data_prep.rows import RowRange, read_rows


@dataclass(frozen=True)
class MediaFile:
    """A file that passed its checks; `path` where it is one of the dataset's."""

    path: str | None
    extension: str
    data: bytes


CHECKS: dict[str, str] = {"videos": "check_video", "audios": "check_audio"}


@dataclass(frozen=True)
class RowReader:
    """How rows become samples.

    Attributes:
        root: the dataset's folder; paths of media are relative to it or to the table's.
        media_dir: a folder in it that paths are relative to instead.
        group_column: column whose value says which samples belong together in a split.
    """

    root: Path
    format: RowFormat = field(default_factory=RowFormat)
    media_dir: str = ""
    max_chars: int = MAX_CHARS
    group_column: str | None = None


@dataclass(frozen=True)
class RawSample:
    """A conversation that passed every check.

    `key` is `{split}-{row number}`: unique without trusting the ids of the source, free of the
    dots and slashes that a shard cannot hold, and it leads back to the row.
    """

    key: str
    messages: list[dict]
    images: list[MediaFile]
    videos: list[MediaFile] = field(default_factory=list)
    audios: list[MediaFile] = field(default_factory=list)
    rejected: list[dict] | None = None
    group: str | None = None


def read_samples(
    rows: RowRange, reader: RowReader, *, start: int = 0
) -> Iterator[tuple[int, RawSample | BadRowError]]:
    """The number of each row from `start` on, and its sample or why there is none."""
    roots = [reader.root / reader.media_dir]
    if not reader.media_dir and rows.table.parent != reader.root:
        roots.append(rows.table.parent)
    for number, row in read_rows(rows):
        if number < start or (rows.picked is not None and number not in rows.picked):
            continue
        if isinstance(row, BadRowError):
            yield number, row
            continue
        try:
            sample = _read_row(row, reader, roots=roots, key=f"{rows.key_prefix}-{number:06d}")
        except BadRowError as error:
            yield number, error
        else:
            yield number, sample


def _read_row(row: dict, reader: RowReader, *, roots: list[Path], key: str) -> RawSample:
    conversation = reader.format.parse(row)
    check_conversation(conversation, max_chars=reader.max_chars)
    media = {
        kind: [_read_medium(source, kind, roots) for source in conversation.media.get(kind, [])]
        for kind in TAGS
    }
    return RawSample(
        key,
        conversation.messages,
        rejected=conversation.rejected,
        group=_group(row, reader.group_column),
        **media,
    )


def _read_medium(source: str | bytes, kind: str, roots: list[Path]) -> MediaFile:
    try:
        data, path = read_media(source, roots=roots)
        return MediaFile(path=path, extension=_checker(kind)(data), data=data)
    except BadRowError as error:
        cause = error.cause
        if cause == "missing_image" and kind != "images":
            cause = "missing_media"
        raise BadRowError(cause, f"{describe_media(source)}: {error.detail}") from error


def _checker(kind: str) -> Callable[[bytes], str]:
    if kind == "images":
        return check_image
    from data_prep import video  # numpy and, later, OpenCV: only for data that holds videos

    return getattr(video, CHECKS[kind])


def _group(row: dict[str, Any], column: str | None) -> str | None:
    if column is None:
        return None
    if row.get(column) is None:
        raise BadRowError("bad_row", f"no column {column} to group by")
    return str(row[column])
