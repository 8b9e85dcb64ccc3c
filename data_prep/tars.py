"""Tar files of samples, written and read as webdataset does: USTAR, no times, no owners."""

import tarfile
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path

Member = tuple[str, bytes]  # name in the tar, content

_SIZE, _SUM = slice(124, 135), slice(148, 156)
_MAX_SIZE = 8**11  # what 11 octal digits cannot hold
END = bytes(2 * tarfile.BLOCKSIZE)


def tar_size(num_bytes: int) -> int:
    """Bytes that a member of so many bytes takes up."""
    blocks = -(-num_bytes // tarfile.BLOCKSIZE)
    return (1 + blocks) * tarfile.BLOCKSIZE


def tar_header(name: str, size: int) -> bytes:
    """The header block that `tarfile` writes for a member; here it takes a tenth of its time."""
    raw = name.encode()
    if len(raw) > 100 or size >= _MAX_SIZE:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")
    template, template_sum = _template()
    header, digits = bytearray(template), b"%011o" % size
    header[: len(raw)] = raw
    header[_SIZE] = digits
    header[_SUM] = b"%06o\0 " % (template_sum + sum(raw) + sum(digits))
    return bytes(header)


def padding(num_bytes: int) -> bytes:
    """Zeros up to the end of a member's last block."""
    return bytes(-num_bytes % tarfile.BLOCKSIZE)


def tar_end(num_bytes: int) -> bytes:
    """What closes a tar of so many bytes: two empty blocks, and zeros up to a whole record."""
    return END + bytes(-(num_bytes + len(END)) % tarfile.RECORDSIZE)


def read_tar_samples(path: Path, *, offset: int = 0) -> Iterator[tuple[int, str, dict[str, bytes]]]:
    """Consecutive members of one key, in order: byte offset of the first, key, name → content.

    The key is what stands before the first dot of a member's base name. Members that are no files,
    or whose names begin with a dot, are passed over.

    Raises:
        tarfile.TarError: the tar is damaged from there on.
    """
    with path.open("rb") as file:
        file.seek(offset)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for key, group in groupby(_members(tar), key=lambda member: _key(member.name)):
                members = {}
                for member in group:
                    if not members:
                        first = member.offset
                    opened = tar.extractfile(member)
                    assert opened is not None, "regular files open"
                    members[member.name[len(key) + 1 :]] = opened.read()
                    tar.members = []  # tarfile would keep every header for ever
                yield first, key, members


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        base = member.name.rpartition("/")[2]
        if member.isreg() and "." in base.lstrip(".") and not base.startswith("."):
            yield member


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


@cache
def _template() -> tuple[bytes, int]:
    """A header without name and size, and its checksum, for which the checksum counts as blanks."""
    header = bytearray(tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict"))
    header[_SIZE], header[_SUM] = bytes(11), b" " * 8
    return bytes(header), sum(header)
