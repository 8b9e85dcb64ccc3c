"""Where raw data comes from: one file a scheme, and for `builtin:` one file a dataset.

A fetched dataset is a folder with `train.jsonl` (and `val.jsonl`, `test.jsonl` where there are any)
beside the files that its rows name.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from data_prep.sources import builtin, path
from vlmcore.errors import DataError


class Source(Protocol):
    """What a scheme's module offers; `location` is what stands behind the colon."""

    def fetch(
        self, location: str, dest: Path, *, options: Mapping[str, Any], seed: int
    ) -> None: ...

    def fingerprint(self, location: str) -> str: ...


SOURCES: dict[str, Source] = {"builtin": builtin, "path": path}


def fetch(source: str, dest: Path, *, options: Mapping[str, Any], seed: int) -> None:
    """Write the raw dataset `source` (`scheme:location`) into the folder `dest`.

    Args:
        options: the source's own settings; an unknown one is an error.
        seed: the same seed gives the same bytes.

    Raises:
        DataError: the source or one of its options is unknown, or there is nothing to read.
    """
    scheme, location = _split(source)
    dest.mkdir(parents=True, exist_ok=True)
    SOURCES[scheme].fetch(location, dest, options=options, seed=seed)


def fingerprint(source: str) -> str:
    """A short text that changes when what `fetch` would read changes, found without reading it all.

    Raises:
        DataError: the source is unknown or missing.
    """
    scheme, location = _split(source)
    return f"{scheme}:{SOURCES[scheme].fingerprint(location)}"


def _split(source: str) -> tuple[str, str]:
    scheme, colon, location = source.partition(":")
    if not colon or not location or scheme not in SOURCES:
        known = ", ".join(f"{name}:…" for name in sorted(SOURCES))
        raise DataError(f"data source {source!r} is not known. Expected one of {known}.")
    return scheme, location
