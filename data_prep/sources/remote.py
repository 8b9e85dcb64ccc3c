"""`s3:BUCKET/KEY` and every other URL that fsspec reads: one object, or all below a prefix.

Credentials, endpoint and region are the filesystem's own (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL …).
"""

import hashlib
import posixpath
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.progress import Progress
from data_prep.sources.http import sha256_check, split_sha256, unreachable
from data_prep.sources.wanted import PLAN_TIMEOUT_S, Wanted, fetch_all
from data_prep.tables import README
from vlmcore.errors import DataError, MissingExtraError

_CHUNK_BYTES = 8 << 20
# What filesystems call the version of an object's content, the surest first.
_VERSIONS = ("ETag", "etag", "md5Hash", "md5", "crc32c", "LastModified", "mtime", "created")
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {
        "config_kwargs": {
            "connect_timeout": PLAN_TIMEOUT_S, "read_timeout": 60, "retries": {"max_attempts": 3},
        }
    }
}  # fmt: skip


def knows(scheme: str) -> bool:
    """Whether fsspec has a filesystem for URLs of this scheme."""
    from fsspec.registry import available_protocols

    return scheme in available_protocols()


def fingerprint(location: str, *, wanted: Wanted) -> str:
    """sha256 over name, size and version (ETag, time of change) of every object.

    Raises:
        UnreachableError: the store does not answer.
        DataError: nothing is there, or it may not be read.
    """
    wanted.refuse("revision", source=location)
    return _digest(_list(split_sha256(location)[0]))


def collect(
    location: str, scratch: Path, *, wanted: Wanted, pinned: str, on_progress: Progress
) -> Mapping[str, Path]:
    """Download the wanted objects, each going on where a killed download stopped.

    Raises:
        UnreachableError: the store does not answer.
        DataError: the content is another than was pinned.
    """
    url, sha256 = split_sha256(location)
    objects = _list(url)
    if _digest(objects) != pinned:
        raise DataError(f"{url} has changed since it was looked up. Run again.")
    fetch = partial(_fetch, url, objects, scratch / pinned[:16])
    names = wanted.choose(
        sorted(objects),
        where=url,
        read_readme=lambda: fetch(README).read_text(encoding="utf-8", errors="replace"),
    )
    if sha256 and len(names) > 1:
        raise DataError(f"{url} is {len(names)} objects: #sha256= is for a single one.")
    found = fetch_all(
        names,
        fetch,
        scratch=scratch / pinned[:16],
        sizes={name: info["size"] for name, info in objects.items()},
        on_progress=on_progress,
    )
    for path in found.values():
        if sha256 and (flaw := sha256_check(sha256)(path)):
            path.unlink()
            raise DataError(f"{url}: {flaw}. What came was thrown away; run again.")
    return found


def _fetch(url: str, objects: Mapping[str, dict[str, Any]], scratch: Path, name: str) -> Path:
    target = scratch / name
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    info = objects[name]
    with _explained(url):
        fs, _ = _open(url)
        with fs.open(info["name"], "rb", cache_type="none") as source, part.open("ab") as file:
            source.seek(file.tell())
            shutil.copyfileobj(source, file, _CHUNK_BYTES)
    if part.stat().st_size != info["size"]:
        found = part.stat().st_size
        part.unlink()
        raise DataError(f"{url}: {name} came with {found} bytes, expected {info['size']}.")
    return part.rename(target)


def _list(url: str) -> dict[str, dict[str, Any]]:
    """Name below the URL → what the filesystem knows of the object."""
    with _explained(url):
        fs, root = _open(url)
        fs.invalidate_cache()
        found = fs.find(root, detail=True)
    if not found:
        raise DataError(f"{url}: nothing is there. Check the bucket and the key.")
    root = root.rstrip("/")
    return {
        posixpath.basename(path) if path == root else path.removeprefix(f"{root}/"): info
        for path, info in sorted(found.items())
        if not path.endswith("/")
    }


def _digest(objects: Mapping[str, dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    for name, info in objects.items():
        version = next((info[key] for key in _VERSIONS if info.get(key)), "")
        digest.update(f"{name}\0{info['size']}\0{version}\n".encode())
    return digest.hexdigest()


def _open(url: str) -> tuple[Any, str]:
    """The filesystem of a URL, and the path on it."""
    from fsspec.core import url_to_fs

    scheme = url.partition(":")[0]
    try:
        return url_to_fs(url, **_OPTIONS.get(scheme, {}))
    except ImportError as error:
        raise MissingExtraError(f"{url}: {error} (pip install it).") from error


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """The filesystems' errors, said in terms of the source."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{url}: nothing is there. Check the bucket and the key.") from error
    except PermissionError as error:
        raise DataError(
            f"{url} may not be read ({error}). Check the credentials in the environment."
        ) from error
    except (ConnectionError, TimeoutError) as error:
        raise unreachable(url, error) from error
    except _botocore_errors() as error:
        if type(error).__name__ != "NoCredentialsError":
            raise unreachable(url, error) from error
        raise DataError(
            f"{url}: no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        ) from error


def _botocore_errors() -> tuple[type[Exception], ...]:
    try:
        from botocore.exceptions import BotoCoreError
    except ImportError:
        return ()
    return (BotoCoreError,)
