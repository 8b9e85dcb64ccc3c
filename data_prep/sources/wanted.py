"""What of a source is wanted, and the files of it that this makes necessary."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Self

from data_prep.progress import Progress, watched
from data_prep.tables import README, choose_tables, superfluous_tables
from vlmcore.errors import DataError
from vlmcore.recipe.schema import Dataset

NUM_CONNECTIONS = 8
PLAN_TIMEOUT_S = 10.0  # what a plan waits for a host that does not answer


class UnreachableError(DataError):
    """A host cannot be reached now; what has been fetched from it before is still good."""


@dataclass(frozen=True)
class Wanted:
    """Which revision of a source, and which part of it; the fields are those of a recipe.

    Attributes:
        media_dir: where the files are that the rows of a single table name.
    """

    revision: str | None = None
    subset: str | None = None
    split: str | None = None
    include: tuple[str, ...] = ()
    media_dir: str = ""

    @classmethod
    def of(cls, dataset: Dataset) -> Self:
        """What a recipe's dataset wants of its source."""
        # other sources bring their files whatever the rows say
        media_dir = dataset.media_dir if dataset.source.startswith("path:") else ""
        return cls(dataset.revision, dataset.subset, dataset.split, dataset.include, media_dir)

    def refuse(self, *fields: str, source: str) -> None:
        """Raise a DataError if a field is set that a source cannot heed."""
        given = [field for field in fields if getattr(self, field)]
        if given:
            raise DataError(f"{source} has no {' and no '.join(given)} to choose by: leave it out.")

    def choose(
        self, names: Sequence[str], *, where: str, read_readme: Callable[[], str]
    ) -> list[str]:
        """The names of a source's files that are to be fetched, sorted.

        Left out are hidden files and the tables of other subsets and splits. All else comes along,
        since only the rows tell which images they need.

        Raises:
            DataError: `include` fits nothing, or `find_tables` would be in doubt: said before
                gigabytes have been fetched.
        """
        here = sorted(name for name in names if not any(p[:1] == "." for p in name.split("/")))
        if self.include:
            here = [name for name in here if any(fnmatchcase(name, one) for one in self.include)]
        if not here:
            raise DataError(
                f"{where}: none of its {len(names)} files is wanted. Check `include`: "
                f"{', '.join(self.include) or 'empty'}."
            )
        # a tar may be a table or an archive: told when it has come, unless the recipe says
        told = bool(self.subset or self.split)
        chosen = choose_tables(
            [name for name in here if told or not name.endswith(".tar")],
            where=where,
            readme=read_readme() if README in here else "",
            subset=self.subset,
            split=self.split,
        )
        unwanted = superfluous_tables(here, chosen)
        return [name for name in here if name not in unwanted]


def fetch_all(
    names: Sequence[str],
    fetch: Callable[[str], Path],
    *,
    scratch: Path,
    sizes: Mapping[str, int],
    on_progress: Progress,
) -> dict[str, Path]:
    """Name → file, several fetched at once; the first error ends all that has not begun.

    Args:
        scratch: where the files arrive.
        sizes: bytes of each; empty where nothing has to come.
    """
    total = sum(sizes[name] for name in names if name in sizes)
    with (
        watched(scratch, total_bytes=total, on_progress=on_progress),
        ThreadPoolExecutor(NUM_CONNECTIONS) as pool,
    ):
        try:
            return dict(zip(names, pool.map(fetch, names), strict=True))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
