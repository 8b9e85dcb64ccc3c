"""Is an artifact still what was published? Quickly for a hit, byte by byte for an audit."""

import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from vlmcore.artifacts.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    content_digest,
    hash_files,
    list_files,
)

Cause = Literal["missing", "size", "sha256", "unexpected", "manifest"]


@dataclass(frozen=True)
class BadFile:
    """One thing in the store that is not as it was published."""

    stage: str
    digest: str
    path: str
    cause: Cause
    detail: str
    """Found and expected, for people."""

    def __str__(self) -> str:
        return f"{self.stage}@{self.digest[:16]}: {self.path}: {self.detail}"


def check_object(folder: Path, *, stage: str, read_all: bool) -> list[BadFile]:
    """What is wrong with the artifact in `folder`; an empty list means that it is whole.

    A quick check (`read_all=False`) compares names and sizes, and reads only the files whose mtime
    is not the manifest's, as git's index does. Files that nobody published are reported only with
    `read_all`: a reader's passing lock or journal file must not spoil a hit.
    """
    try:
        manifest = Manifest.read(folder)
    except FileNotFoundError:
        return [_bad_manifest(folder, stage, "not there")]
    except ValidationError as error:
        return [_bad_manifest(folder, stage, f"not a manifest: {error.errors()[0]['msg']}")]
    digest = content_digest(manifest.files)
    if manifest.digest != digest or digest[:16] != folder.name:
        detail = f"says digest {manifest.digest[:16]}, its files give {digest[:16]}"
        return [_bad_manifest(folder, stage, f"{detail}, the folder is {folder.name}")]

    bad = check_files(folder, manifest, read_all=read_all)
    if read_all:
        extra = set(list_files(folder)) - {entry.path for entry in manifest.files} - {MANIFEST}
        detail = "was not published with it"
        bad += [BadFile(stage, digest, path, "unexpected", detail) for path in sorted(extra)]
    return bad


def check_files(folder: Path, manifest: Manifest, *, read_all: bool) -> list[BadFile]:
    """Which files of the manifest are missing, of another size or (where read) other content."""

    def bad(entry: FileEntry, cause: Cause, detail: str) -> BadFile:
        return BadFile(manifest.stage, manifest.digest, entry.path, cause, detail)

    found: list[BadFile] = []
    to_read: list[tuple[FileEntry, os.stat_result]] = []
    for entry in manifest.files:
        try:
            status = (folder / entry.path).lstat()
        except (FileNotFoundError, NotADirectoryError):
            found.append(bad(entry, "missing", f"not there, expected {entry.size} bytes"))
            continue
        if not stat.S_ISREG(status.st_mode):
            found.append(bad(entry, "missing", "not a plain file, expected one"))
        elif status.st_size != entry.size:
            found.append(bad(entry, "size", f"{status.st_size} bytes, expected {entry.size} bytes"))
        elif read_all or status.st_mtime_ns != entry.mtime_ns:
            to_read.append((entry, status))

    sums = hash_files([folder / entry.path for entry, _ in to_read])
    for (entry, status), got in zip(to_read, sums, strict=True):
        if isinstance(got, OSError):
            found.append(bad(entry, "sha256", f"cannot be read: {got.strerror}"))
        elif got != entry.sha256:
            found.append(bad(entry, "sha256", f"sha256 {got}, expected {entry.sha256}"))
        elif status.st_mtime_ns != entry.mtime_ns:
            with suppress(OSError):  # only a favour to the next check; a store may be read-only
                os.utime(folder / entry.path, ns=(status.st_atime_ns, entry.mtime_ns))
    return found


def _bad_manifest(folder: Path, stage: str, detail: str) -> BadFile:
    return BadFile(stage, folder.name, MANIFEST, "manifest", detail)
