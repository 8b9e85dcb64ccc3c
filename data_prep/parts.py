"""A range of rows → the parts of shards it makes, each published with a record of its digest.

A record is written last, so a part that has one is whole; whoever writes the range again after a
kill goes on behind the last of them.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from data_prep.causes import Dropped
from data_prep.rows import RowRange
from data_prep.samples import RawSample, RowReader, read_samples
from data_prep.tars import Member, padding, tar_end, tar_header, tar_size


@dataclass
class Part:
    """One written tar file, or none (`digest` empty) where no row was usable.

    Attributes:
        next_row: number of the first row that is not in it.
        is_last: no other part of the range follows.
    """

    name: str
    next_row: int = 0
    is_last: bool = False
    num_samples: int = 0
    num_media: dict[str, int] = field(default_factory=dict)
    size_bytes: int = 0
    digest: str = ""
    dropped: Dropped = field(default_factory=Dropped)


def write_range(
    rows: RowRange, *, dest: Path, reader: RowReader, max_shard_bytes: int
) -> list[Part]:
    """Check and write some rows as `{split}-{row}.{part}.tar`: as many parts as bytes require.

    Parts that an earlier try finished are kept.
    """
    parts = _finished(rows, dest)
    if parts and parts[-1].is_last:
        return parts
    start = parts[-1].next_row if parts else rows.first
    writer = PartWriter(dest, _name(rows, len(parts)))
    table = rows.table.relative_to(reader.root) if rows.table.is_relative_to(reader.root) else ""
    for number, outcome in read_samples(rows, reader, start=start):
        if isinstance(outcome, RawSample):
            members = sample_members(outcome)
            if not writer.has_room(members, max_shard_bytes):
                parts.append(writer.close(next_row=number, is_last=False))
                writer = PartWriter(dest, _name(rows, len(parts)))
            writer.add(members)
        else:
            writer.part.dropped.add(f"{table}:{number}", outcome)
        writer.part.dropped.num_rows += 1
    parts.append(writer.close(next_row=rows.first + rows.num_rows, is_last=True))
    return parts


def sample_members(sample: RawSample) -> list[Member]:
    """A sample's JSON, then its media in the order of their tags."""
    conversation: dict = {"messages": sample.messages}
    media: list[Member] = []
    for kind, prefix, files in (
        ("images", "", sample.images),
        ("videos", "v", sample.videos),
        ("audios", "a", sample.audios),
    ):
        names = [f"{prefix}{index}.{file.extension}" for index, file in enumerate(files)]
        if names or kind == "images":
            conversation[kind] = names
        media += [
            (f"{sample.key}.{name}", file.data) for name, file in zip(names, files, strict=True)
        ]
    if sample.rejected is not None:
        conversation["rejected_messages"] = sample.rejected
    if sample.group is not None:
        conversation["group"] = sample.group
    return [(f"{sample.key}.json", _to_json(conversation).encode()), *media]


class PartWriter:
    """Writes one tar under a name of its own; `close` records it."""

    def __init__(self, dest: Path, name: str) -> None:
        self.part = Part(name)
        self._path = dest / f"{name}.tar"
        self._record = dest / f"{name}.json"
        # one write a megabyte: the page cache then asks for larger pages, which halves its time
        self._file = self._path.open("wb", buffering=1 << 20)
        self._digest = xxhash.xxh3_128()

    def has_room(self, members: list[Member], max_bytes: int) -> bool:
        """Whether members fit; an empty part has room for anything."""
        more = sum(tar_size(len(data)) for _, data in members)
        return not self.part.size_bytes or self.part.size_bytes + more <= max_bytes

    def add(self, members: list[Member]) -> None:
        """Append one sample."""
        for name, data in members:
            self._write(tar_header(name, len(data)))
            self._write(data)
            self._write(padding(len(data)))
            kind = _KINDS.get(name.partition(".")[2][:1], "images")
            self.part.num_media[kind] = self.part.num_media.get(kind, 0) + 1
        self.part.num_samples += 1

    def close(self, *, next_row: int, is_last: bool) -> Part:
        """Finish the tar and record it; one without a sample leaves only its record."""
        part = self.part
        part.next_row, part.is_last = next_row, is_last
        if part.num_samples:
            self._write(tar_end(part.size_bytes))
            part.digest = self._digest.hexdigest()
        self._file.close()
        if not part.num_samples:
            self._path.unlink()
        unfinished = self._record.with_suffix(".unfinished")
        unfinished.write_text(
            json.dumps({**vars(part), "dropped": vars(part.dropped)}), encoding="utf-8"
        )
        unfinished.replace(self._record)
        return part

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.part.size_bytes += len(data)


def _name(rows: RowRange, index: int) -> str:
    return f"{rows.key_prefix}-{rows.first:012d}.{index}"


def _finished(rows: RowRange, dest: Path) -> list[Part]:
    """The parts of a range that have a record and are still what it says, from the first on."""
    parts: list[Part] = []
    while not parts or not parts[-1].is_last:
        name = _name(rows, len(parts))
        try:
            record = json.loads((dest / f"{name}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            break
        part = Part(**{**record, "dropped": Dropped(**record["dropped"])})
        if not _is_whole(dest / f"{name}.tar", part):
            break
        parts.append(part)
    return parts


def _is_whole(path: Path, part: Part) -> bool:
    if not part.num_samples:
        return True
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except FileNotFoundError:
        return False
    return digest.hexdigest() == part.digest


_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_KINDS = {"j": "json", "v": "videos", "a": "audios"}
