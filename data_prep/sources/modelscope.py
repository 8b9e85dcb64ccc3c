"""`modelscope:USER/NAME`: a repository of ModelScope or of a mirror of it.

A dataset's, or with `modelscope:models/USER/NAME` a model's. Its own client does the work: endpoint
and token are MODELSCOPE_ENDPOINT and MODELSCOPE_API_TOKEN, downloads go on where they stopped, and
each is checked against the sha256 of the listing. A branch has no commit there that one could ask
for, so the listing itself, which holds every file's sha256, is what is pinned.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.progress import Progress
from data_prep.sources.hf import COMMIT, repository
from data_prep.sources.http import unreachable
from data_prep.sources.wanted import PLAN_TIMEOUT_S, Wanted, fetch_all
from data_prep.tables import README
from vlmcore.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    from modelscope_hub import FileInfo

DEFAULT_REVISION = "master"


def fingerprint(location: str, *, wanted: Wanted) -> str:
    """`USER/NAME@COMMIT` of a full commit as `revision`, else the digest of the files' listing.

    Raises:
        UnreachableError: the hub does not answer.
        DataError: no such repository or revision, or it may not be read.
    """
    if wanted.revision and COMMIT.fullmatch(wanted.revision):
        return f"{location}@{wanted.revision}"
    return f"{location}@{_digest(_list(location, wanted.revision))}"


def collect(
    location: str, scratch: Path, *, wanted: Wanted, pinned: str, on_progress: Progress
) -> Mapping[str, Path]:
    """Download the wanted files.

    Raises:
        UnreachableError: the hub does not answer.
        DataError: the repository is no longer what was pinned, or a file is not what it lists.
    """
    files = _list(location, wanted.revision)
    pin = pinned.rpartition("@")[2]
    if pin not in (wanted.revision, _digest(files)):
        raise DataError(f"modelscope:{location} has changed since it was looked up. Run again.")
    entries = {one.path: one for one in files}

    def fetch(name: str) -> Path:
        with _explained(location, wanted.revision):
            return _api().download_file(
                **repository(location),
                file_path=name,
                revision=wanted.revision or DEFAULT_REVISION,
                local_dir=scratch / pin,
                expected_sha256=entries[name].sha256,
                file_size=entries[name].size,
            )

    names = wanted.choose(
        sorted(entries),
        where=f"modelscope:{location}",
        read_readme=lambda: fetch(README).read_text(encoding="utf-8", errors="replace"),
    )
    sizes = {name: entry.size or 0 for name, entry in entries.items()}
    return fetch_all(names, fetch, scratch=scratch / pin, sizes=sizes, on_progress=on_progress)


def _list(location: str, revision: str | None) -> list["FileInfo"]:
    with _explained(location, revision):
        _check_reachable()
        found = _api().list_repo_files(
            **repository(location), revision=revision or DEFAULT_REVISION
        )
    return [one for one in found if one.type != "tree"]


def _digest(files: list["FileInfo"]) -> str:
    listing = sorted((one.path, one.size, one.sha256) for one in files)
    return "listing-" + hashlib.sha256(repr(listing).encode()).hexdigest()[:40]


def _check_reachable() -> None:
    """Ask once with a short timeout: the client itself tries again for a minute."""
    import httpx

    endpoint = _endpoint()
    try:
        httpx.head(endpoint, timeout=PLAN_TIMEOUT_S)
    except httpx.TransportError as error:
        raise unreachable(endpoint, error) from error


def _api():  # noqa: ANN202 - modelscope_hub's HubApi, loaded when it is needed
    from modelscope_hub import HubApi, HubConfig

    logging.getLogger("modelscope_hub").setLevel(logging.WARNING)  # it tells each page it lists
    return HubApi(HubConfig())  # not the process's default one: the environment counts


def _endpoint() -> str:
    from modelscope_hub import HubConfig

    return str(HubConfig().endpoint)


@contextmanager
def _explained(location: str, revision: str | None) -> Iterator[None]:
    """The client's errors, said in terms of the source."""
    try:
        from modelscope_hub import errors
    except ImportError as error:
        raise MissingExtraError(
            f"modelscope:{location} needs the package modelscope-hub: pip install modelscope-hub"
        ) from error

    where = f"modelscope:{location} on {_endpoint()}"
    try:
        yield
    except errors.FileIntegrityError as error:
        raise DataError(
            f"{where}: {error} What came was thrown away; run again, and if it stays so the server "
            "or a proxy hands out damaged content."
        ) from error
    except (errors.NetworkError, errors.ServerError, errors.RateLimitError) as error:
        raise unreachable(where, error) from error
    except errors.NotExistError as error:
        raise DataError(
            f"{where}: no such repository, or no revision {revision or DEFAULT_REVISION!r}, or it "
            "is private. Check the names; for a private one set MODELSCOPE_API_TOKEN; a model's "
            "repository is modelscope:models/USER/NAME."
        ) from error
    except errors.HubError as error:
        raise DataError(
            f"{where}: {type(error).__name__}: {error}. Check the name and MODELSCOPE_API_TOKEN."
        ) from error
