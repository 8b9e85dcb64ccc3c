"""The bytes of a medium, wherever a row has them: a file, a URL, base64 text, or the row itself."""

import base64
import binascii
import errno
import os
import stat
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

from data_prep.causes import BadRowError
from data_prep.conversation import Media
from data_prep.files import is_inside

MAX_FILE_BYTES = 2 * 1024**3  # a long video; nothing larger is read into memory
FETCH_TIMEOUT_S = 20.0
FETCH_TRIES = 3
FETCH_CHUNK = 1 << 16
# Base64 of the files of usual kinds begins so; other base64 text needs a `data:` URI.
BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "SUkqA", "TU0AK")
MIN_BASE64_CHARS = 64


def read_media(source: Media, *, roots: Sequence[Path]) -> tuple[bytes, str | None]:
    """The bytes of a medium, and its file where it is one of the dataset's.

    Args:
        source: what the row holds.
        roots: folders that a path may be relative to, tried in order.

    Raises:
        BadRowError: `unsafe_path`, `missing_image`, `absurd_size`, `bad_base64`, `fetch_failed`.
    """
    if isinstance(source, bytes):
        return source, None
    if source.startswith("data:"):
        return _from_data_uri(source), None
    if source.startswith(("http://", "https://")):
        return fetch_url(source), None
    if len(source) >= MIN_BASE64_CHARS and source.startswith(BASE64_STARTS):
        return _from_base64(source), None
    return _read_file(source, roots)


def describe_media(source: Media) -> str:
    """A medium in a message: a path or URL as it is, everything else by its kind and length."""
    if isinstance(source, bytes):
        return f"{len(source)} bytes in the row"
    return source if len(source) <= 200 else f"{source[:40]}… ({len(source)} characters)"


def fetch_url(url: str, *, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """What a URL answers, within limits of time and size; tried again where the server stumbled.

    Raises:
        BadRowError: `fetch_failed`.
    """
    import urllib.error  # a third of what a worker imports: only for data that names URLs
    from http.client import HTTPException

    detail = ""
    for attempt in range(FETCH_TRIES):
        time.sleep(attempt)  # 0, 1, 2 seconds
        try:
            return _fetch_once(url, max_bytes)
        except urllib.error.HTTPError as error:
            detail = f"HTTP {error.code}"
            if error.code < 500 and error.code != 429:
                break
        except (OSError, HTTPException, ValueError) as error:
            detail = f"{type(error).__name__}: {error}"
    raise BadRowError("fetch_failed", detail)


def _fetch_once(url: str, max_bytes: int) -> bytes:
    import urllib.request

    began, chunks, size = time.monotonic(), [], 0
    with urllib.request.urlopen(url, timeout=FETCH_TIMEOUT_S) as answer:
        if urlsplit(answer.url).scheme not in ("http", "https"):
            raise BadRowError("fetch_failed", f"led to {answer.url}")
        while chunk := answer.read(FETCH_CHUNK):
            chunks.append(chunk)
            size += len(chunk)
            if size > max_bytes:
                raise BadRowError("fetch_failed", f"more than {max_bytes} bytes")
            if time.monotonic() - began > FETCH_TIMEOUT_S * 10:
                raise BadRowError("fetch_failed", f"not done in {FETCH_TIMEOUT_S * 10:.0f} s")
    return b"".join(chunks)


def _from_data_uri(uri: str) -> bytes:
    header, comma, body = uri.partition(",")
    if not comma:
        raise BadRowError("bad_base64", "a data URI without a comma")
    if header.endswith(";base64"):
        return _from_base64(body)
    return unquote_to_bytes(body)


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRowError("bad_base64", str(error)) from error


def _read_file(name: str, roots: Sequence[Path]) -> tuple[bytes, str]:
    reason = "no such file"
    for root in roots:
        inside = name
        if name.startswith("/"):  # a row of this machine's own, naming a file of the dataset
            inside = os.path.relpath(name, root)
        if not is_inside(inside):
            raise BadRowError("unsafe_path", "leads out of the dataset")
        path = os.path.join(root, inside)  # noqa: PTH118 - a Path takes as long as the read
        try:
            return _read_regular(path, root), path
        except OSError as error:
            reason = error.strerror or str(error)
        except ValueError as error:  # half of a surrogate pair in the name
            reason = str(error)
    raise BadRowError("missing_image", reason)


def _read_regular(path: str, root: Path) -> bytes:
    folder = os.path.dirname(path)  # noqa: PTH120
    if not _stays_inside(folder, root):
        raise BadRowError("unsafe_path", "a link leads out of the dataset")
    # O_NONBLOCK: a pipe must not hold us up; O_NOFOLLOW: a link is looked at first
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        if not _stays_inside.__wrapped__(path, root):
            raise BadRowError("unsafe_path", "a link leads out of the dataset") from error
        handle = os.open(path, flags)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError(errno.ENOENT, "not a file")
        if status.st_size > MAX_FILE_BYTES:
            raise BadRowError("absurd_size", f"{status.st_size} bytes")
        data = os.read(handle, status.st_size)
        while len(data) < status.st_size and (more := os.read(handle, status.st_size)):
            data += more
        return data
    finally:
        os.close(handle)


@lru_cache(maxsize=4096)
def _stays_inside(path: str, root: Path) -> bool:
    real = os.path.realpath(root)
    return (os.path.realpath(path) + os.sep).startswith(real.rstrip(os.sep) + os.sep)
