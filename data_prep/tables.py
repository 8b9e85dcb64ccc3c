"""Which files of a fetched folder hold rows, and of which split: by name alone, nothing is opened.

A fetched folder holds a source's files as they are; archives have been unpacked where they lay. Its
tables are `.jsonl`, `.parquet`, `.arrow`, `.json`, `.csv`, `.tsv` or (webdataset) `.tar`; the kind
that comes first in this list is meant where there are several. What a hub's dataset repositories do
to tell subsets and splits apart is understood:

    README.md                                  its front matter's `configs:` with `data_files`
    train.jsonl  val.json                      a file a split
    data/train-00000-of-00003.parquet          a split in several files
    SUBSET/train-00000-of-00001.parquet        a folder a subset
    train/0001.tar  validation/0001.tar        a folder a split
    train/data-00000-of-00002.arrow            as `save_to_disk` has it
    SUBSET.json                                several files that name no split
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import yaml

from data_prep import SPLITS
from vlmcore.errors import DataError

KINDS = (".jsonl", ".parquet", ".arrow", ".json", ".csv", ".tsv", ".tar")
README = "README.md"
# Other words for our splits: what `datasets` understands, and `eval` and `dev`.
ALIASES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val", "eval": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
_WORD = re.compile(rf"(?<![a-z])({'|'.join(ALIASES)})(?![a-z])")  # also in val2017
_PREFIX = re.compile(r"(?<![a-z])(train|val|dev|eval|test)")  # also in testmini
_NUMBERED = re.compile(r"^(?P<split>.*?)-\d+-of-\d+(-[0-9a-f]+)?$")  # as `push_to_hub` names files
# JSON files that are about the tables and hold no rows; MANIFEST.json is our artifacts'.
_NO_ROWS = re.compile(r"^(dataset_infos?|state|metadata|config(uration)?|package|MANIFEST)\.json$")


@dataclass(frozen=True)
class _Table:
    """A file with rows, and what its place says: `split` is the source's own word for it."""

    name: str
    subset: str
    split: str
    is_default: bool  # of the subset that is meant where none is told


def find_tables(
    place: Path, *, subset: str | None = None, split: str | None = None
) -> dict[str, list[Path]]:
    """Our split (`train`, `val`, `test`, in this order) → its files, in the order of their rows.

    Args:
        place: A fetched dataset's folder, or a table that is told by its own name alone.
        subset: The source's name of a subset; None: its default one, or the only one.
        split: The source's name of a split, which is then the only one; it stands under our word
            for it (`validation` under `val`), and under `train` if it has none. None: every split
            that has a word of ours; a source that names no split is all `train`.

    Raises:
        DataError: There is no table, no such subset or split, or names do not tell which is meant;
            the message lists what there is.
    """
    folder, names = place, _names(place)
    if place.is_file():
        folder, names = place.parent, [place.name]
    readme = place / README
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    chosen = choose_tables(names, where=str(place), readme=text, subset=subset, split=split)
    if not chosen:
        raise DataError(f"{place}: no table of rows there. Expected a file {', '.join(KINDS)}.")
    return {ours: [folder / name for name in files] for ours, files in chosen.items()}


def _names(folder: Path) -> list[str]:
    # texts: making a Path of each of half a million pictures would take longer than reading them
    cut = len(os.path.join(folder, ""))  # noqa: PTH118
    return [
        os.path.join(where, file)[cut:]  # noqa: PTH118
        for where, _, files in os.walk(folder)
        for file in files
        if file.endswith(KINDS)
    ]


def choose_tables(
    names: Iterable[str],
    *,
    where: str,
    readme: str = "",
    subset: str | None = None,
    split: str | None = None,
) -> dict[str, list[str]]:
    """As `find_tables`, of the files' names alone: also before any of them has been fetched.

    Empty without any table: it may be in an archive that is still to be fetched.

    Args:
        names: Paths relative to the folder.
        where: What an error calls the folder.
        readme: Text of its README.md.

    Raises:
        DataError: As `find_tables`, but for having no table.
    """
    names = sorted((name for name in names if name.endswith(KINDS)), key=_natural)
    tables = _declared(names, readme) or _laid_out(names)
    if not tables:
        return {}
    return _by_split(_of_subset(tables, subset, where=where), split, where=where)


def superfluous_tables(names: Sequence[str], chosen: dict[str, list[str]]) -> set[str]:
    """The tables of the kind that was chosen that belong to other subsets and splits."""
    wanted = {name for files in chosen.values() for name in files}
    kinds = {PurePosixPath(name).suffix for name in wanted}
    return {name for name in names if PurePosixPath(name).suffix in kinds and name not in wanted}


def _declared(names: list[str], readme: str) -> list[_Table]:
    """What the README's front matter says of `data_files`."""
    tables = []
    for config in _configs(readme):
        subset = str(config.get("config_name", "default"))
        for split, patterns in _data_files(config.get("data_files")):
            root = str(config.get("data_dir") or "")
            globs = [PurePosixPath(root, one).parts for one in patterns]
            tables += [
                _Table(name, subset, split, subset == "default" or bool(config.get("default")))
                for name in names
                if PurePosixPath(name).suffix in KINDS
                and any(_fits(PurePosixPath(name).parts, one) for one in globs)
            ]
    return tables


def _fits(parts: Sequence[str], glob: Sequence[str]) -> bool:
    """Whether a path fits a glob, of which `**` alone stands for several folders."""
    if not parts or not glob:
        return not parts and not glob
    if glob[0] == "**":
        return _fits(parts, glob[1:]) or _fits(parts[1:], glob)
    return fnmatchcase(parts[0], glob[0]) and _fits(parts[1:], glob[1:])


def _configs(readme: str) -> list[dict]:
    front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", readme, re.DOTALL)
    if front is None:
        return []
    try:
        found = yaml.safe_load(front[1])
    except yaml.YAMLError:  # a card for people: its faults are none of the data's
        return []
    configs = found.get("configs") if isinstance(found, dict) else None
    return [one for one in configs or [] if isinstance(one, dict)]


def _data_files(entry: object) -> Iterator[tuple[str, list[str]]]:
    """(split, globs) of a config: one glob, several, or several for each split."""
    for one in entry if isinstance(entry, list) else [entry]:
        if isinstance(one, str):
            yield "train", [one]
        elif isinstance(one, dict) and "path" in one:
            path = one["path"]
            patterns = path if isinstance(path, list) else [path]
            yield str(one.get("split", "train")), [str(pattern) for pattern in patterns]


def _laid_out(names: list[str]) -> list[_Table]:
    """What folders and file names say."""
    rows = [
        path
        for path in map(PurePosixPath, names)
        if path.suffix in KINDS
        and not _NO_ROWS.match(path.name)
        and not any(part.startswith(".") for part in path.parts)
    ]
    if not rows:
        return []
    kind = min((path.suffix for path in rows), key=KINDS.index)
    rows = [path for path in rows if path.suffix == kind]
    described = {f"{path.with_suffix('')}_meta" for path in rows}  # as in LLaVA-Pretrain
    return [_place(path) for path in rows if str(path.with_suffix("")) not in described]


def _place(path: PurePosixPath) -> _Table:
    folders = [part for part in path.parts[:-1] if part != "data"]
    split = _split_of(path.stem)
    if not split:
        split = next((part for part in folders if part.lower() in ALIASES), "")
        folders = [part for part in folders if part != split]
    return _Table(str(path), "/".join(folders), split, is_default=folders in ([], ["default"]))


def _split_of(stem: str) -> str:
    if numbered := _NUMBERED.match(stem):
        return "" if numbered["split"] == "data" else numbered["split"]
    word = _WORD.search(stem.lower())
    return word[1] if word else ""


def _of_subset(tables: list[_Table], subset: str | None, *, where: str) -> list[_Table]:
    """The tables of one subset: the one without a name, `default`, or the only one, if not told."""
    subsets = sorted({table.subset for table in tables})
    # A file that names no split may be what is meant by its own name.
    stems = sorted({PurePosixPath(table.name).stem for table in tables if not table.split})
    if subset is None:
        chosen = [table for table in tables if table.is_default]
        if not chosen and len(subsets) > 1:
            raise DataError(f"{where}: several subsets, set `subset` to one of {_listed(subsets)}.")
        chosen = chosen or tables
        unnamed = [table for table in chosen if not table.split]
        if len(unnamed) > 1 and not _are_parts(unnamed):
            raise DataError(
                f"{where}: several tables, and no name says which split it is: set `subset` to "
                f"one of {_listed(stems)}."
            )
        return chosen
    chosen = [table for table in tables if table.subset == subset]
    chosen = chosen or [table for table in tables if PurePosixPath(table.name).stem == subset]
    if not chosen:
        known = _listed([one for one in subsets if one] or stems) or "none"
        raise DataError(f"{where}: no subset {subset!r}; there is {known}.")
    return chosen


def _are_parts(tables: list[_Table]) -> bool:
    """Whether names differ only in numbers: `part-000.tar`, `part-001.tar`."""
    return len({re.sub(r"\d+", "", PurePosixPath(table.name).name) for table in tables}) == 1


def _by_split(tables: list[_Table], split: str | None, *, where: str) -> dict[str, list[str]]:
    found = sorted({table.split for table in tables})
    if split is not None:
        theirs = split if split in found else _alias(split, found)
        if theirs is None:
            known = _listed([one for one in found if one]) or "none is named"
            raise DataError(f"{where}: no split {split!r}; there is {known}.")
        return {_ours(theirs) or "train": [one.name for one in tables if one.split == theirs]}
    chosen: dict[str, list[str]] = {}
    for ours in SPLITS:
        meant = [one for one in found if ALIASES.get(one.lower()) == ours]
        meant = meant or [one for one in found if _ours(one) == ours]
        if ours == "train" and not meant and len(found) == 1 and _ours(found[0]) is None:
            meant = found  # a source that names no split, or one of its own
        if len(meant) > 1:
            raise DataError(f"{where}: {_listed(meant)} could all be {ours}, set `split` to one.")
        if meant:
            chosen[ours] = [one.name for one in tables if one.split == meant[0]]
    if not chosen:
        raise DataError(
            f"{where}: none of the splits {_listed(found)} is called train, val or test: set "
            "`split` to one of them."
        )
    return chosen


def _ours(split: str) -> str | None:
    """Our word for a split: `train` for `train_sft`, `test` for `testmini`, None for `all`."""
    word = _PREFIX.search(split.lower())
    return ALIASES[word[1]] if word else None


def _alias(split: str, found: list[str]) -> str | None:
    ours = ALIASES.get(split.lower())
    return next((one for one in found if ours and ALIASES.get(one.lower()) == ours), None)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts `part-10` behind `part-9`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
