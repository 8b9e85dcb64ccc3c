"""Fetched files → the dataset's folder; archives are unpacked, trusting nothing that they say.

A member's name decides where it goes only after it was found to stay inside. Links are written as
second names of files that came before them, so that none is ever followed. Sizes are counted as
bytes are written, whatever the headers promise.
"""

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
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO

from data_prep.files import is_inside
from vlmcore.errors import DataError

TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_CHUNK = 1 << 20
# What zipfile, tarfile and the decompressors raise on damaged bytes.
_DAMAGE = (
    zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError,
    struct.error, NotImplementedError, RuntimeError, UnicodeError, ValueError,
)  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What an archive may grow to; a ratio counts once `free_bytes` have been written."""

    max_members: int = 20_000_000
    max_bytes: int = 8 * 1024**4
    max_ratio: int = 200  # text at best 50, a black picture's raw pixels 1000
    free_bytes: int = 1024**3


LIMITS = Limits()


def settle(
    files: Mapping[str, Path], dest: Path, *, scratch: Path, limits: Limits = LIMITS
) -> None:
    """Bring the files to their names in `dest`: those in `scratch` are moved, others copied.

    Archives are unpacked into the folder that they lie in, and are not kept.

    Raises:
        DataError: a name leads out of `dest`, or an archive is damaged, unsafe or too large.
    """
    for name, file in sorted(files.items()):
        if not is_inside(name):
            raise DataError(f"{name!r} leads out of the dataset's folder. Do not use this source.")
        target = dest / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if is_archive(file):
            unpack(file, target.parent, limits=limits)
        elif file.is_relative_to(scratch):
            file.replace(target)
        else:
            shutil.copyfile(file, target)


def is_archive(file: Path) -> bool:
    """Whether a file is to be unpacked; a webdataset shard is a tar too, but stays as it is."""
    name = file.name.lower()
    return name.endswith((".zip", *TARS)) or (name.endswith(".tar") and not _is_shard(file))


def _is_shard(file: Path) -> bool:
    """Whether the first two files of a tar belong to one sample: `0001.jpg`, `0001.json`."""
    try:
        with tarfile.open(file, "r:") as tar:
            names = [one.name for one in islice((one for one in tar if one.isreg()), 2)]
    except (tarfile.TarError, OSError):
        return False  # its damage is told when it is unpacked
    keys = [posixpath.join(posixpath.dirname(n), posixpath.basename(n).split(".")[0]) for n in names]
    return len(keys) == 2 and keys[0] == keys[1] and names[0] != names[1]


def unpack(archive: Path, target: Path, *, limits: Limits = LIMITS) -> None:
    """Unpack a zip, or a tar with or without compression, into the folder `target`.

    Raises:
        DataError: with the names of the archive and the member: a path or link that leads out, a
            device, an encrypted or damaged member, another file in its place, or too much of it.
    """
    writer = _Writer(archive, target, limits)
    members = _zip_members if archive.name.lower().endswith(".zip") else _tar_members
    with _naming_damage(writer):
        for name, kind, link, opened in members(archive, writer):
            if kind == "link":
                writer.link(name, link)
            elif kind == "file":
                writer.write(name, opened)


Member = tuple[str, str, str, Callable[[], IO[bytes]]]  # name, kind, link's target, content


def _zip_members(archive: Path, writer: "_Writer") -> Iterator[Member]:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            writer.enter(info.filename)
            mode = stat.S_IFMT(info.external_attr >> 16)
            if info.flag_bits & 1:
                raise writer.fault("is encrypted")
            if mode == stat.S_IFLNK:
                if info.file_size > 4096:
                    raise writer.fault("is a link with an absurd target")
                link = posixpath.join(posixpath.dirname(info.filename), file.read(info).decode())
                yield info.filename, "link", link, file.fp.__class__
            elif info.is_dir():
                yield info.filename, "folder", "", file.fp.__class__
            elif mode in (0, stat.S_IFREG):
                yield info.filename, "file", "", lambda info=info: file.open(info)
            else:
                raise writer.fault("is a device or another thing that is no file")
