"""Where raw data comes from: one file a scheme, and for `builtin:` one file a dataset.

A fetched dataset is a folder that holds the source's files, byte for byte; archives have been
unpacked where they lay. Which of the files are rows of which split is `data_prep.tables`' to say.
"""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from data_prep.progress import Progress, quiet
from data_prep.sources import builtin, hf, http, modelscope, path, remote
from data_prep.sources.archives import settle
from data_prep.sources.wanted import UnreachableError, Wanted
from vlmcore.errors import DataError

__all__ = ["UnreachableError", "Wanted", "fetch", "fingerprint"]


class Source(Protocol):
    """What a scheme's module offers; `location` is what stands behind the colon, or a whole URL."""

    def fingerprint(self, location: str, *, wanted: Wanted) -> str:
        """What `collect` would read, pinned, without reading it all."""

    def collect(
        self, location: str, scratch: Path, *, wanted: Wanted, pinned: str, on_progress: Progress
    ) -> Mapping[str, Path]:
        """Name in the dataset → file; files in `scratch` are linked, others are copied."""


SOURCES: dict[str, Source] = {
    "hf": hf, "http": http, "https": http, "modelscope": modelscope, "path": path, "s3": remote,
}  # fmt: skip


def fetch(
    source: str,
    dest: Path,
    *,
    options: Mapping[str, Any],
    seed: int,
    wanted: Wanted = Wanted(),  # noqa: B008 - frozen
    pinned: str | None = None,
    scratch: Path | None = None,
    on_progress: Progress = quiet,
) -> None:
    """Write the raw dataset `source` (`scheme:location`) into the folder `dest`.

    Args:
        options: a builtin's own settings; an unknown one is an error.
        seed: the same seed gives the same bytes.
        wanted: which revision and which part.
        pinned: what `fingerprint` said: exactly that is fetched. None: as things are now.
        scratch: where an interrupted download leaves what the next one goes on from.

    Raises:
        DataError: the source or one of its options is unknown, there is nothing to read, or what
            came is not what was pinned.
    """
    scheme, location = _split(source)
    dest.mkdir(parents=True, exist_ok=True)
    if scheme == "builtin":
        builtin.fetch(location, dest, options=options, seed=seed)
        return
    if options:
        raise DataError(f"{source} has no options, found {', '.join(sorted(options))}.")
    pinned = pinned or fingerprint(source, wanted=wanted)
    with TemporaryDirectory(dir=dest.parent, prefix=".fetch-") as temporary:
        scratch = scratch or Path(temporary)
        found = SOURCES[scheme].collect(
            location,
            scratch,
            wanted=wanted,
            pinned=pinned.partition(":")[2],
            on_progress=on_progress,
        )
        settle(found, dest, scratch=scratch)


def fingerprint(source: str, *, wanted: Wanted = Wanted()) -> str:  # noqa: B008 - frozen
    """A short text that changes when what `fetch` would read changes, found without reading it all.

    Raises:
        UnreachableError: the host does not answer, and no revision is pinned.
        DataError: the source is unknown or missing.
    """
    scheme, location = _split(source)
    if scheme == "builtin":
        wanted.refuse("revision", "include", source=source)
        return f"builtin:{builtin.fingerprint(location)}"
    return f"{scheme}:{SOURCES[scheme].fingerprint(location, wanted=wanted)}"


def _split(source: str) -> tuple[str, str]:
    """(scheme, what stands behind it); a URL of any scheme that fsspec knows stays whole."""
    scheme, colon, location = source.partition(":")
    if colon and location:
        if scheme in ("http", "https", "s3"):
            return scheme, f"{scheme}://{location.removeprefix('//')}"
        if scheme == "builtin" or scheme in SOURCES:
            return scheme, location
        if location.startswith("//") and remote.knows(scheme):
            return "s3", source
    known = ", ".join(f"{name}:…" for name in sorted([*SOURCES, "builtin"]))
    raise DataError(
        f"data source {source!r} is not known. Expected one of {known}, or a URL that fsspec reads."
    )
