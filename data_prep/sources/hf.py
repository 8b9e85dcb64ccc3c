"""`hf:USER/NAME`: a repository of the Hugging Face hub or of a mirror of it.

A dataset's, or with `hf:models/USER/NAME` a model's. Endpoint and token are the client's own:
HF_ENDPOINT, HF_TOKEN. The client finds the commit and the files; their bytes come over
`http.download`, because the client throws away what a killed process had of a file (1.33,
huggingface_hub#4228), and because it checks sizes alone.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.progress import Progress
from data_prep.sources.http import Download, download, sha256_check, unreachable
from data_prep.sources.wanted import PLAN_TIMEOUT_S, UnreachableError, Wanted, fetch_all
from data_prep.tables import README
from vlmcore.errors import DataError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

COMMIT = re.compile(r"[0-9a-f]{40}")


def fingerprint(location: str, *, wanted: Wanted) -> str:
    """`USER/NAME@COMMIT`; a full commit as `revision` is taken at its word, without the hub.

    Raises:
        UnreachableError: the hub does not answer.
        DataError: no such repository or revision, or it may not be read.
    """
    if wanted.revision and COMMIT.fullmatch(wanted.revision):
        return f"{location}@{wanted.revision}"
    with _explained(location, wanted.revision):
        info = _api().repo_info(
            **repository(location),
            revision=wanted.revision,
            timeout=PLAN_TIMEOUT_S,
            expand=["sha"],  # not the names of all its files
        )
    return f"{location}@{info.sha}"


def collect(
    location: str, scratch: Path, *, wanted: Wanted, pinned: str, on_progress: Progress
) -> Mapping[str, Path]:
    """Download the wanted files of the pinned commit, or take them from the client's cache.

    Raises:
        UnreachableError: the hub does not answer, and the cache does not have the whole commit.
        DataError: it may not be read, or a file is not what the commit says.
    """
    commit = pinned.rpartition("@")[2]
    sizes: dict[str, int] = {}
    fetch: Callable[[str], Path]
    try:
        with _explained(location, commit):
            tree = _api().list_repo_tree(**repository(location), revision=commit, recursive=True)
            entries = {one.path: one for one in tree if hasattr(one, "blob_id")}
        fetch, names = partial(_fetch, location, commit, entries, scratch), sorted(entries)
        sizes = {name: entry.size for name, entry in entries.items()}
    except UnreachableError:
        folder = _cached(location, commit)
        if folder is None:
            raise
        fetch = folder.joinpath
        names = [one.relative_to(folder).as_posix() for one in folder.rglob("*") if one.is_file()]
    names = wanted.choose(
        names,
        where=f"hf:{location}",
        read_readme=lambda: fetch(README).read_text(encoding="utf-8", errors="replace"),
    )
    return fetch_all(names, fetch, scratch=scratch / commit, sizes=sizes, on_progress=on_progress)


def _fetch(
    location: str, commit: str, entries: Mapping[str, "RepoFile"], scratch: Path, name: str
) -> Path:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    entry = entries[name]
    target = scratch / commit / name
    wanted = Download(
        hf_hub_url(**repository(location), filename=name, revision=commit),
        build_hf_headers(),
        size=entry.size,
        check=sha256_check(entry.lfs.sha256) if entry.lfs else _blob_check(entry.blob_id),
    )
    download(wanted, target)
    return target


def _cached(location: str, commit: str) -> Path | None:
    """What `hf download` left of the whole commit on this machine."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(**repository(location), revision=commit, local_files_only=True)
        )
    except LocalEntryNotFoundError:
        return None


def _blob_check(expected: str) -> Callable[[Path], str | None]:
    """Whether a file is the git blob `expected`: sha1 over its size and content."""

    def check(path: Path) -> str | None:
        data = path.read_bytes()  # what is large is in LFS
        found = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        return None if found == expected else f"git blob is {found}, expected {expected}"

    return check


def repository(location: str) -> dict[str, Any]:
    """What a client calls the repository that stands behind the colon."""
    kind, slash, name = location.partition("/")
    if slash and kind in ("datasets", "models"):
        return {"repo_id": name, "repo_type": kind.removesuffix("s")}
    return {"repo_id": location, "repo_type": "dataset"}


def _api():  # noqa: ANN202 - huggingface_hub's HfApi, loaded when it is needed
    from huggingface_hub import HfApi

    return HfApi()


@contextmanager
def _explained(location: str, revision: str | None):  # noqa: ANN202
    """The client's errors, said in terms of the source."""
    import httpx
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"hf:{location} on {constants.ENDPOINT}"
    try:
        yield
    except GatedRepoError as error:
        raise DataError(
            f"{where} is gated: accept its terms on its page, and set HF_TOKEN to a token of that "
            "account."
        ) from error
    except RevisionNotFoundError as error:
        raise DataError(
            f"{where} has no revision {revision!r}: expected a branch, a tag or a commit."
        ) from error
    except RepositoryNotFoundError as error:
        raise DataError(
            f"{where}: no such repository, or it is private. Check the name; for a private one set "
            "HF_TOKEN; a model's repository is hf:models/USER/NAME."
        ) from error
    except HFValidationError as error:
        raise DataError(f"hf:{location}: {error} Expected hf:USER/NAME.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status >= 500 or status == 429:
            raise unreachable(where, error) from error
        raise DataError(f"{where}: HTTP {status}. Check HF_TOKEN and HF_ENDPOINT.") from error
    except (httpx.TransportError, OfflineModeIsEnabled) as error:
        raise unreachable(where, error) from error
