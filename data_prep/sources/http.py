"""`http(s):`: one file by its address; and the one way that bytes come over HTTP here.

A download goes on where a killed one stopped, if the server still has the same file. `#sha256=HEX`
behind the address is checked against the content.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from data_prep.progress import Progress, watched
from data_prep.sources.wanted import PLAN_TIMEOUT_S, UnreachableError, Wanted
from vlmcore.errors import DataError

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 5  # in a row that bring nothing
BACKOFF_S = 1.0  # doubled each time
MAX_WAIT_S = 60.0
READ_TIMEOUT_S = 60.0
_TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_REMEDIES = {
    401: "It asks for a login: put it into ~/.netrc, or the hub's token into the environment.",
    403: "It forbids this: check that your account or token may read it.",
    404: "Nothing is there: check the address.",
}


@dataclass(frozen=True)
class Download:
    """A file to be had, and what is known of it before."""

    url: str
    headers: Mapping[str, str]
    size: int | None = None
    validator: str | None = None  # ETag or Last-Modified
    check: Callable[[Path], str | None] | None = None  # what is wrong with the file, if anything


def fingerprint(location: str, *, wanted: Wanted) -> str:
    """The sha256 that the address carries, else what the server says identifies the content.

    Raises:
        UnreachableError: the server does not answer.
        DataError: it has no such file.
    """
    wanted.refuse("revision", "include", source=location)
    url, sha256 = split_sha256(location)
    if sha256:
        return f"sha256={sha256}"
    validator, size = _probe(url)
    if validator is None:
        log.warning("%s names no version of its content: add #sha256=HEX to the address", url)
    return f"{validator};size={size}"


def collect(
    location: str, scratch: Path, *, wanted: Wanted, pinned: str, on_progress: Progress
) -> Mapping[str, Path]:
    """Download the file under the last name of its address.

    Raises:
        UnreachableError: the server does not answer.
        DataError: the content is another than was pinned.
    """
    url, sha256 = split_sha256(location)
    size: int | None = None
    validator: str | None = None
    if not sha256:
        validator, size = _probe(url)
        if f"{validator};size={size}" != pinned:
            raise DataError(f"{url} has changed since it was looked up. Run again.")
    name = unquote(PurePosixPath(urlsplit(url).path).name) or "download"
    target = scratch / hashlib.sha256(f"{url} {pinned}".encode()).hexdigest()[:16] / name
    check = sha256_check(sha256) if sha256 else None
    with watched(target.parent, total_bytes=size or 0, on_progress=on_progress):
        download(Download(url, {}, size=size, validator=validator, check=check), target)
    return {name: target}


def split_sha256(location: str) -> tuple[str, str | None]:
    """An address without its `#sha256=HEX`, and the HEX.

    Raises:
        DataError: what stands behind `#` is something else.
    """
    url, hash_mark, fragment = location.partition("#")
    sha256 = fragment.removeprefix("sha256=").lower()
    if hash_mark and (len(sha256) != 64 or set(sha256) - set("0123456789abcdef")):
        raise DataError(f"{url}: found #{fragment}, expected #sha256= and 64 hexadecimal digits.")
    return url, sha256 or None


def sha256_check(expected: str) -> Callable[[Path], str | None]:
    """A check for `Download` and for any other file."""

    def check(path: Path) -> str | None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        return None if found == expected else f"sha256 is {found}, expected {expected}"

    return check


def download(wanted: Download, target: Path) -> None:
    """Bring a file to `target`, going on from `.NAME.part` beside it if there is one.

    Raises:
        UnreachableError: several attempts in a row brought nothing.
        DataError: there is no such file, or what came fails its check (it is thrown away).
    """
    import httpx

    if target.is_file() and _flaw(wanted, target) is None:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    timeout = httpx.Timeout(READ_TIMEOUT_S, connect=PLAN_TIMEOUT_S)
    attempt = 0
    with httpx.Client(follow_redirects=True, timeout=timeout) as client:
        while True:
            before = _size(part)
            try:
                _continue(client, wanted, part)
                break
            except (httpx.TransportError, _ComeBackError) as error:
                attempt = 0 if _size(part) > before else attempt + 1
                if attempt == MAX_ATTEMPTS:
                    raise unreachable(wanted.url, error) from error
                wait_s = getattr(error, "wait_s", None) or BACKOFF_S * 2**attempt
                log.warning("%s: %s; trying again in %.0f s", wanted.url, error, wait_s)
                time.sleep(min(wait_s, MAX_WAIT_S))
    if flaw := _flaw(wanted, part):
        part.unlink()
        raise DataError(
            f"{wanted.url}: {flaw}. What came was thrown away; run again, and if it stays so the "
            "server or a proxy hands out damaged content."
        )
    part.rename(target)


def unreachable(what: str, error: Exception) -> UnreachableError:
    """The error for a host that does not answer."""
    return UnreachableError(
        f"{what} cannot be reached ({type(error).__name__}: {error}). Check the network, the "
        "proxy (HTTPS_PROXY) and the mirror (HF_ENDPOINT, MODELSCOPE_ENDPOINT)."
    )


class _ComeBackError(Exception):
    """The server cannot serve now, or broke off; `wait_s` is what it asks for."""

    def __init__(self, what: str, wait_s: float | None = None) -> None:
        super().__init__(what)
        self.wait_s = wait_s


def _continue(client: "httpx.Client", wanted: Download, part: Path) -> None:
    """One request for what `part` lacks."""
    offset = _size(part)
    if offset and offset == wanted.size:
        return
    headers = {**wanted.headers, "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if wanted.validator and not wanted.validator.startswith("W/"):
            headers["If-Range"] = wanted.validator
    with client.stream("GET", wanted.url, headers=headers) as response:
        if response.status_code == 416:  # the part is no beginning of what is there now
            part.unlink()
            raise _ComeBackError("the server has other content than the part that is here")
        _check_status(response)
        total = _total(response)
        goes_on = response.headers.get("Content-Range", "").startswith(f"bytes {offset}-")
        with part.open("ab" if response.status_code == 206 and goes_on else "wb") as file:
            for chunk in response.iter_raw():  # as it comes: a break loses what is held back
                file.write(chunk)
    if total is not None and _size(part) < total:
        raise _ComeBackError(f"broke off at byte {_size(part)} of {total}")


def _flaw(wanted: Download, path: Path) -> str | None:
    if wanted.size is not None and _size(path) != wanted.size:
        return f"{_size(path)} bytes came, expected {wanted.size}"
    return wanted.check(path) if wanted.check else None


def _probe(url: str) -> tuple[str | None, int | None]:
    """(ETag or Last-Modified, size) of what an address holds."""
    import httpx

    headers = {"Accept-Encoding": "identity"}
    try:
        with httpx.Client(follow_redirects=True, timeout=PLAN_TIMEOUT_S) as client:
            response = client.head(url, headers=headers)
            if response.status_code in (403, 405, 501):  # signed addresses are for GET alone
                with client.stream("GET", url, headers={**headers, "Range": "bytes=0-0"}) as got:
                    response = got
            _check_status(response)
    except (httpx.TransportError, _ComeBackError) as error:
        raise unreachable(url, error) from error
    except httpx.InvalidURL as error:
        raise DataError(f"{url} is no address: {error}.") from error
    found = response.headers
    return found.get("ETag") or found.get("Last-Modified"), _total(response)


def _check_status(response: "httpx.Response") -> None:
    status = response.status_code
    if status in _TRY_AGAIN:
        wait = response.headers.get("Retry-After", "")
        raise _ComeBackError(f"HTTP {status}", float(wait) if wait.isdigit() else None)
    if status >= 400:
        remedy = _REMEDIES.get(status, "Check the address.")
        raise DataError(f"{response.request.url}: HTTP {status}. {remedy}")


def _total(response: "httpx.Response") -> int | None:
    """Size of the whole file, whatever part of it is in this answer."""
    size = response.headers.get("Content-Range", "").rpartition("/")[2]
    if response.status_code != 206:
        size = response.headers.get("Content-Length", "")
    return int(size) if size.isdigit() else None


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
