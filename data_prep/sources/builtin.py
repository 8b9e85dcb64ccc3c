"""`builtin:NAME`: datasets that this package makes itself: a first run needs no download."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ValidationError

from data_prep.sources import handwritten_numbers, written_numbers
from vlmcore.errors import DataError


class Builtin(Protocol):
    """What a dataset's module offers; `VERSION` grows whenever the bytes it writes change."""

    @property
    def VERSION(self) -> int: ...  # noqa: N802

    @property
    def Options(self) -> type[BaseModel]: ...  # noqa: N802

    def write(self, dest: Path, *, options: Any, seed: int) -> None: ...


BUILTINS: dict[str, Builtin] = {
    "handwritten_numbers": handwritten_numbers,
    "written_numbers": written_numbers,
}


def fetch(location: str, dest: Path, *, options: Mapping[str, Any], seed: int) -> None:
    """Make the builtin dataset named `location`.

    Raises:
        DataError: no such dataset, or an option that it does not have or that is out of range.
    """
    dataset = _find(location)
    try:
        checked = dataset.Options.model_validate(dict(options))
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()
        )
        known = ", ".join(dataset.Options.model_fields)
        raise DataError(f"builtin:{location}: {faults}. Its options are {known}.") from error
    dataset.write(dest, options=checked, seed=seed)


def fingerprint(location: str) -> str:
    """The dataset's name and version."""
    return f"{location}@{_find(location).VERSION}"


def _find(name: str) -> Builtin:
    if name not in BUILTINS:
        known = ", ".join(f"builtin:{known}" for known in sorted(BUILTINS))
        raise DataError(f"data source 'builtin:{name}' is not known. Expected one of {known}.")
    return BUILTINS[name]
