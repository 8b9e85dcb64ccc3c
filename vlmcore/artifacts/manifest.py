"""What an artifact says about itself: the record of its build and the list of its files."""

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from vlmcore.errors import ArtifactError

MANIFEST = "MANIFEST.json"
# sha256 and read() release the GIL; more than cores, since a shared filesystem answers slowly
_HASH_THREADS = 8


class _Frozen(BaseModel):
    # a loss that ran away is worth knowing: as strings, since JSON has no NaN
    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")


class FileEntry(_Frozen):
    """One file of an artifact; `path` is relative and written with forward slashes."""

    path: str
    size: int
    sha256: str
    mtime_ns: int
    """As of hashing: while a file still has it, it need not be hashed again to be trusted."""
    volatile: bool = False


class InputRef(_Frozen):
    """An input by name, without its folder, so that a store can be moved."""

    stage: str
    key: str
    digest: str


class BuildRecord(_Frozen):
    """What was built from what, with what, and how long it took."""

    stage: str
    kind: str
    version: int
    key: str
    digest: str
    params: dict[str, Any]
    inputs: dict[str, InputRef | list[InputRef]]
    num_files: int
    size_bytes: int
    started_at: datetime
    seconds: float
    """The builder's own time, without hashing and publishing."""
    metrics: dict[str, Any]
    versions: dict[str, str]
    git_commit: str | None

    @property
    def finished_at(self) -> datetime:
        """When the builder returned."""
        return self.started_at + timedelta(seconds=self.seconds)

    @property
    def input_refs(self) -> list[tuple[str, InputRef]]:
        """Every input with its name; the members of a list are named `name[0]`, `name[1]`, …"""
        flat: list[tuple[str, InputRef]] = []
        for name, given in self.inputs.items():
            if isinstance(given, InputRef):
                flat.append((name, given))
            else:
                flat += [(f"{name}[{i}]", one) for i, one in enumerate(given)]
        return flat


class Manifest(BuildRecord):
    """A build record with the files that it stands for."""

    files: list[FileEntry]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The manifest of an artifact's folder.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not a manifest.
        """
        return cls.model_validate_json((folder / MANIFEST).read_bytes())

    @property
    def record(self) -> BuildRecord:
        """The same without the files."""
        return BuildRecord.model_construct(
            **{name: getattr(self, name) for name in BuildRecord.model_fields}
        )


def content_digest(files: Iterable[FileEntry]) -> str:
    """The sha256 (hex) of the paths, sizes and sha256 of all files that are not volatile."""
    rows = sorted([entry.path, entry.size, entry.sha256] for entry in files if not entry.volatile)
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def hash_content(folder: Path, *, volatile: Sequence[str], stage: str) -> list[FileEntry]:
    """Every file under `folder` (except the manifest itself) with its size and sha256, sorted.

    Raises:
        ArtifactError: nothing there that counts, or something that is not a plain file.
    """
    paths = sorted(path for path in list_files(folder) if path != MANIFEST)
    if odd := [path for path in paths if not _is_plain(folder / path) or not _is_utf8(path)]:
        raise ArtifactError(
            f"{stage}: {folder} holds links, special files or names that are not UTF-8: {odd}. "
            "An artifact must stand on its own: let the stage copy or hard-link files instead."
        )

    def entry(path: str) -> FileEntry:
        # before hashing: a write that comes during it leaves another mtime, and is found by it
        status = (folder / path).stat()
        return FileEntry(
            path=path,
            size=status.st_size,
            sha256=file_sha256(folder / path),
            mtime_ns=status.st_mtime_ns,
            volatile=any(fnmatchcase(path, pattern) for pattern in volatile),
        )

    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        entries = list(pool.map(entry, paths))
    if all(entry.volatile for entry in entries):
        raise ArtifactError(
            f"{stage}: the stage ended without an error but left no content in {folder} "
            f"({len(entries)} volatile files). Expected at least one file that is not volatile."
        )
    return entries


def hash_files(paths: Sequence[Path]) -> list[str | OSError]:
    """The sha256 (hex) of each file, or the error that kept it from being read."""

    def one(path: Path) -> str | OSError:
        try:
            return file_sha256(path)
        except OSError as error:
            return error

    if not paths:
        return []
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        return list(pool.map(one, paths))


def file_sha256(path: Path) -> str:
    """The sha256 (hex) of a file, read in small pieces."""
    with path.open("rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def list_files(folder: Path) -> list[str]:
    """Relative paths of all under `folder` that is not a real folder; links are not followed."""
    found: list[str] = []
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        found += [(Path(parent) / name).relative_to(folder).as_posix() for name in files + links]
    return found


def _is_plain(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
