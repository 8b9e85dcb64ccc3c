"""Tensors kept on disk under a key, for any number of processes that read and write at once.

An entry is one file, written beside its place and then renamed. It begins with the digest of what
follows, so nothing needs to be synced or locked: what a kill, a power cut or a bad disk leaves is
no entry, and is made anew. SQLite reads and writes small entries faster, but those of pictures more
slowly, and its WAL mode does not work on network filesystems (https://sqlite.org/wal.html).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import xxhash
from safetensors.torch import load, save
from torch import Tensor

from vlmcore.dataloading.cache_room import mark_used

log = logging.getLogger(__name__)

MIN_FREE = 0.1  # of the disk; the rest of it is for checkpoints, which are worth more
_DIGEST_BYTES, _SIZE_BYTES = 16, 8
_CODEC = "lz4"  # as good as zstd on these, and faster
_DRAFT_S = 3600  # an older draft is of a process that was killed


class EncodedCache:
    """Entries under one folder, which may be deleted at any time.

    A process that cannot write says so once and only reads from then on.

    Args:
        folder: Made with the first entry.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._drafts = folder / "drafts"
        self._writes = True
        self._warned = False
        self._remove_old_drafts()

    def get(self, key: str) -> dict[str, Tensor] | None:
        """What was put under a key; None where there is nothing, or nothing whole."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn_of_damage(path, error)
            return None
        body = memoryview(content)[_DIGEST_BYTES:]
        if xxhash.xxh3_128_digest(body) != content[:_DIGEST_BYTES]:
            self._warn_of_damage(path, "its bytes are not those that were written")
            return None
        mark_used(path)
        size = int.from_bytes(body[:_SIZE_BYTES], "little")
        return load(pa.decompress(body[_SIZE_BYTES:], size, codec=_CODEC, asbytes=True))

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps tensors under a key, if the disk has room."""
        if not self._writes:
            return
        plain = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        body = len(plain).to_bytes(_SIZE_BYTES, "little") + pa.compress(plain, _CODEC, asbytes=True)
        try:
            self._write(self._path(key), xxhash.xxh3_128_digest(body) + body)
        except OSError as error:
            self._writes = False
            log.warning("encoded samples are no longer kept in %s: %s", self.folder, error)

    def _write(self, path: Path, content: bytes) -> None:
        self._drafts.mkdir(parents=True, exist_ok=True)
        disk = shutil.disk_usage(self._drafts)
        if disk.free - len(content) < MIN_FREE * disk.total:
            raise OSError(errno.ENOSPC, f"less than {MIN_FREE:.0%} of the disk would be left")
        draft = self._drafts / uuid.uuid4().hex
        try:
            draft.write_bytes(content)
            path.parent.mkdir(exist_ok=True)
            draft.replace(path)
        except OSError:
            draft.unlink(missing_ok=True)
            raise

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key[2:]

    def _warn_of_damage(self, path: Path, cause: object) -> None:
        if not self._warned:
            self._warned = True
            log.warning("%s is damaged and made anew, as are others like it: %s", path, cause)

    def _remove_old_drafts(self) -> None:
        for draft in self._drafts.glob("*"):
            with contextlib.suppress(FileNotFoundError):  # just renamed, or removed by another
                if time.time() - draft.stat().st_mtime > _DRAFT_S:
                    draft.unlink()
