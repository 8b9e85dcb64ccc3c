"""Fetched files → the dataset's folder; archives are unpacked, trusting nothing that they say.

A member's name decides where it goes only after it was found to stay inside. Links are written as
second names of files that came before them, so that none is ever followed. Sizes are counted as
bytes are written, whatever the headers promise.
"""

import bz2
import errno
import filecmp
import gzip
import lzma
import os
import posixpath
import shutil
import stat
import struct
import tarfile
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO

from data_prep.files import is_inside, link_or_copy
from vlmcore.errors import DataError

COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
COMPRESSED_TABLES = (".jsonl.gz", ".json.gz", ".csv.gz", ".tsv.gz")
_CHUNK_BYTES = 1 << 20
_MAX_LINK_BYTES = 4096
_MAX_TAIL_CHUNKS = 16  # behind a tar's end marker is padding, some kB of zeros
_COMPRESSIONS: dict[bytes, Callable] = {
    b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open,
}  # fmt: skip
# What zipfile, tarfile and the decompressors raise on damaged bytes (gzip's is an OSError).
_DAMAGE = (
    zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, struct.error,
    NotImplementedError, ValueError, OSError,
)  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What an archive may grow to."""

    max_members: int = 20_000_000
    max_bytes: int = 8 * 1024**4
    max_ratio: int = 200  # unpacked over packed: text comes to 20, zeros to 1000
    min_bomb_bytes: int = 1024**3  # below it no ratio is harmful


LIMITS = Limits()


def settle(files: Mapping[str, Path], dest: Path, *, scratch: Path) -> None:
    """Bring the files to their names in `dest`: those in `scratch` as links, others as copies.

    Archives are unpacked into the folder that they lie in, and are not kept.

    Raises:
        DataError: a name leads out of `dest`, or an archive is damaged, unsafe or too large.
    """
    archives = []
    for name, file in sorted(files.items()):
        if not is_inside(name):
            raise DataError(f"{name!r} leads out of the dataset's folder. Do not use this source.")
        target = dest / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if is_archive(file):
            archives.append((file, target.parent))
        elif file.is_relative_to(scratch):
            link_or_copy(file, target)  # a killed settling finds its downloads again
        else:
            shutil.copyfile(file, target)
    for file, folder in archives:  # last: a member never takes a file's place
        unpack(file, folder)


def is_archive(file: Path) -> bool:
    """Whether a file is to be unpacked; a webdataset shard is a tar too, but stays as it is."""
    name = file.name.lower()
    if name.endswith((".zip", *COMPRESSED_TARS, *COMPRESSED_TABLES)):
        return True
    return name.endswith(".tar") and not _is_shard(file)


def _is_shard(file: Path) -> bool:
    """Whether the first two files of a tar belong to one sample: `0001.jpg`, `0001.json`."""
    try:
        with tarfile.open(file, "r:") as tar:
            names = [one.name for one in islice((one for one in tar if one.isreg()), 2)]
    except (tarfile.TarError, OSError):
        return False  # its damage is told when it is unpacked
    keys = {name[: name.find(".", name.rfind("/") + 1)] for name in names}
    return len(set(names)) == 2 and len(keys) == 1


def unpack(archive: Path, target: Path, *, limits: Limits = LIMITS) -> None:
    """Unpack a zip, a tar with or without compression or a .gz table into the folder `target`.

    Raises:
        DataError: with the names of the archive and the member: a path or link that leads out, a
            device, an encrypted or damaged member, another file in its place, or too much of it.
    """
    unpacking = _Unpacking(archive, target, limits)
    name = archive.name.lower()
    members = _tar_members
    if name.endswith(".zip"):
        members = _zip_members
    elif name.endswith(COMPRESSED_TABLES):
        members = _only_member
    try:
        for member in members(archive):
            unpacking.take(member)
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's, not the archive's
        raise unpacking.fault(f"is damaged ({error or type(error).__name__})") from error


@dataclass(frozen=True)
class _Member:
    """A file, a link (`link` is what it names, relative to the archive), or what is refused."""

    name: str
    open: Callable[[], AbstractContextManager[IO[bytes]]] | None = None
    link: str | None = None
    is_folder: bool = False
    refused: str = ""


class _Unpacking:
    """Writes members and keeps account of them."""

    def __init__(self, archive: Path, target: Path, limits: Limits) -> None:
        self._archive = archive
        self._target = target
        self._limits = limits
        self._packed_bytes = max(1, archive.stat().st_size)
        self._num_members = 0
        self._num_bytes = 0
        self._name = "the first member"
        self._draft = target / f".{uuid.uuid4().hex}.part"

    def fault(self, what: str) -> DataError:
        """The error for the member that is being looked at."""
        return DataError(
            f"{self._archive.name}: {self._name} {what}. Fetch the archive again; if it is meant "
            "to be so, unpack it by hand and give the folder as path:DIR."
        )

    def take(self, member: _Member) -> None:
        """Write a member to its place.

        Raises:
            DataError: it is unsafe, or the archive has grown past its limits.
        """
        self._name = repr(member.name)
        self._num_members += 1
        if self._num_members > self._limits.max_members:
            raise self.fault(f"is one more than the {self._limits.max_members} members allowed")
        if member.refused:
            raise self.fault(member.refused)
        if member.is_folder:
            return
        target = self._place(member.name, "leads out of the dataset's folder")
        if member.open is not None:
            with member.open() as source, self._draft.open("wb") as file:
                for chunk in iter(lambda: source.read(_CHUNK_BYTES), b""):
                    self._count(len(chunk))
                    file.write(chunk)
        else:
            self._link(str(member.link))
        self._publish(target)

    def _place(self, name: str, fault: str) -> Path:
        name = posixpath.normpath(name.replace("\\", "/"))
        if not is_inside(name):
            raise self.fault(fault)
        try:
            name.encode()
            target = self._target / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.exists()  # as the first to meet a name that is too long
        except UnicodeEncodeError as error:
            raise self.fault("has a name that is no UTF-8") from error
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise self.fault("has a name too long for this filesystem") from error
            if error.errno in (errno.EEXIST, errno.ENOTDIR):
                raise self.fault("would take the place of another file") from error
            raise
        return target

    def _link(self, link: str) -> None:
        first = self._place(link, f"is a link that leads out, to {link!r}")
        if not first.is_file():
            raise self.fault(f"is a link to {link!r}, which is no file that came before it")
        os.link(first, self._draft)

    def _publish(self, target: Path) -> None:
        if not target.exists():
            self._draft.rename(target)
            return
        is_same = target.is_file() and filecmp.cmp(self._draft, target, shallow=False)
        self._draft.unlink()
        if not is_same:
            raise self.fault("would take the place of another file")

    def _count(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        if self._num_bytes > self._limits.max_bytes:
            raise self.fault(f"grows past the {self._limits.max_bytes} bytes allowed")
        ratio = self._num_bytes / self._packed_bytes
        if self._num_bytes > self._limits.min_bomb_bytes and ratio > self._limits.max_ratio:
            raise self.fault(
                f"is part of a bomb: {self._packed_bytes} bytes have grown to more than "
                f"{self._num_bytes}, {self._limits.max_ratio} times as many are allowed"
            )


def _only_member(archive: Path) -> Iterator[_Member]:
    yield _Member(archive.name[: -len(".gz")], open=partial(gzip.open, archive))


def _zip_members(archive: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            name, kind = info.filename, stat.S_IFMT(info.external_attr >> 16)
            if info.flag_bits & 1:
                yield _Member(name, refused="is encrypted")
            elif info.is_dir():
                yield _Member(name, is_folder=True)
            elif kind == stat.S_IFLNK and info.file_size <= _MAX_LINK_BYTES:
                link = file.read(info).decode()
                yield _Member(name, link=posixpath.join(posixpath.dirname(name), link))
            elif kind in (0, stat.S_IFREG):
                yield _Member(name, open=partial(file.open, info))
            else:
                yield _Member(name, refused="is neither a file nor a folder")


class _StrictInfo(tarfile.TarInfo):
    """tarfile takes a damaged header behind the first one for the end, and says nothing."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):  # noqa: ANN001, ANN206 - tarfile's own signature
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error}; it may be cut short") from error


def _tar_members(archive: Path) -> Iterator[_Member]:
    with (
        _decompressed(archive) as stream,
        tarfile.open(fileobj=stream, mode="r|", tarinfo=_StrictInfo) as tar,
    ):
        for info in tar:
            tar.members.clear()  # tarfile keeps every member that it has seen
            if info.isdir():
                yield _Member(info.name, is_folder=True)
            elif info.issym():
                link = posixpath.join(posixpath.dirname(info.name), info.linkname)
                yield _Member(info.name, link=link)
            elif info.islnk():
                yield _Member(info.name, link=info.linkname)
            elif info.isreg():
                yield _Member(info.name, open=partial(tar.extractfile, info))
            else:
                yield _Member(info.name, refused="is neither a file nor a folder")
        # checksums stand at the very end, where tarfile does not come
        for _ in range(_MAX_TAIL_CHUNKS):
            if not stream.read(_CHUNK_BYTES):
                return
        raise tarfile.ReadError("it goes on behind its end")


def _decompressed(archive: Path) -> IO[bytes]:
    """What is in a compressed file, told by its first bytes; any other file as it is."""
    with archive.open("rb") as file:
        head = file.read(6)
    for magic, opened in _COMPRESSIONS.items():
        if head.startswith(magic):
            return opened(archive)
    return archive.open("rb")
