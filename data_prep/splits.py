"""Finished shards dealt anew: into train, val and test by ratio, and without repeated samples.

What shares an image (or a group) goes to one split together, so that no image is in two of them.
"""

import hashlib
import itertools
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from data_prep import SPLITS
from data_prep.causes import BadRowError, Dropped
from data_prep.duplicates import SampleFacts, find_duplicates, sample_facts
from data_prep.parts import Part, PartWriter
from data_prep.shards import (
    MAX_SAMPLES_PER_SHARD,
    MAX_SHARD_BYTES,
    ShardReport,
    read_report,
    shard_name,
    write_report,
)
from data_prep.tars import read_tar_samples
from data_prep.workers import mapper
from vlmcore.errors import DataError

log = logging.getLogger(__name__)

SplitBy = Literal["image", "sample", "group"]
Duplicates = Literal["keep", "exact", "perceptual"]


@dataclass(frozen=True)
class Deal:
    """How samples are dealt.

    Attributes:
        split: parts of train, val and test, such as (9, 1, 0); None keeps each where it is.
        split_by: what stays together: samples that share an image, a group, or nothing.
        duplicates: which repeated samples are left out, the first being kept.
        seed: decides which sample goes where.
    """

    split: tuple[float, float, float] | None = None
    split_by: SplitBy = "image"
    duplicates: Duplicates = "keep"
    seed: int = 0


def deal(
    shards_dir: Path,
    dest: Path,
    how: Deal,
    *,
    num_workers: int = 1,
    max_samples_per_shard: int = MAX_SAMPLES_PER_SHARD,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ShardReport:
    """Write the shards of `shards_dir` anew into `dest`, members byte for byte as they are.

    Raises:
        DataError: no group column was stored, or a split that was asked for stays empty.
    """
    report = read_report(shards_dir)
    tars = [(split, shards_dir / name) for split in report.shards for name in report.shards[split]]
    read = partial(_facts, looks=how.duplicates == "perceptual")
    with mapper(num_workers) as run:
        listed = list(run(read, [path for _, path in tars]))
    facts = list(itertools.chain.from_iterable(listed))
    repeated = {}
    if how.duplicates != "keep":
        repeated = find_duplicates(facts, near=how.duplicates == "perceptual")
    kept = [one for one in facts if one.key not in repeated]
    if how.split is None:
        split_of = {
            one.key: split for (split, _), many in zip(tars, listed, strict=True) for one in many
        }
    else:
        split_of = assign_splits(kept, how)
    target = {one.key: split_of[one.key] for one in kept}
    dest.mkdir(parents=True, exist_ok=True)
    shards = _Shards(dest, max_samples_per_shard, max_shard_bytes)
    for _, path in tars:
        for _, key, members in read_tar_samples(path):
            if key in target:
                shards.add(target[key], [(f"{key}.{name}", data) for name, data in members.items()])
    return _publish(report, shards.close(), repeated, dest)


def assign_splits(facts: Iterable[SampleFacts], how: Deal) -> dict[str, str]:
    """Key → split. Whatever belongs together goes to one split; sizes follow the ratios.

    Which comes first is decided by a hash of the content and the seed, not by the order of rows.

    Raises:
        DataError: a sample has no group, or a split of a ratio above 0 gets no sample.
    """
    assert how.split is not None, "without ratios nothing is assigned"
    groups = _together(list(facts), how.split_by)
    order = sorted(groups, key=lambda name: hashlib.sha256(b"%d:" % how.seed + name).digest())
    total, done = sum(map(len, groups.values())), 0
    bounds = [part / sum(how.split) * total for part in itertools.accumulate(how.split)]
    found = {}
    for name in order:
        # by the group's middle: a large one at a border goes where most of it belongs
        middle = done + len(groups[name]) / 2
        index = next(i for i, bound in enumerate(bounds) if middle <= bound or i == len(bounds) - 1)
        found |= dict.fromkeys(groups[name], SPLITS[index])
        done += len(groups[name])
    counts = Counter(found.values())
    empty = [s for s, part in zip(SPLITS, how.split, strict=True) if part and not counts[s]]
    if empty:
        raise DataError(
            f"{total} samples in {len(groups)} groups that stay together ({how.split_by}) leave "
            f"{', '.join(empty)} empty at {_ratio(how.split)}. Take other ratios or more samples."
        )
    return found


def _together(facts: list[SampleFacts], by: SplitBy) -> dict[bytes, list[str]]:
    """Name of a group → keys of its samples. Samples with the same content always share one."""
    if by == "group":
        if any(one.group is None for one in facts):
            raise DataError("split_by: group needs `group_column`, which the shards do not have.")
        names = [str(one.group).encode() for one in facts]
    elif by == "sample":
        names = [one.texts + b"".join(one.media) for one in facts]
    else:
        names = _components([one.media or (one.texts,) for one in facts])
    groups: dict[bytes, list[str]] = {}
    for one, name in zip(facts, names, strict=True):
        groups.setdefault(name, []).append(one.key)
    return groups


def _components(links: list[tuple[bytes, ...]]) -> list[bytes]:
    """Samples connected through any number of shared images get one name: the least digest."""
    parent: dict[bytes, bytes] = {}

    def root(one: bytes) -> bytes:
        while (up := parent.setdefault(one, one)) != one:
            parent[one] = parent[up]
            one = up
        return one

    for link in links:
        first = root(link[0])
        for other in link[1:]:
            mine, theirs = sorted((first, root(other)))
            parent[theirs] = first = mine
    return [root(link[0]) for link in links]


class _Shards:
    """Numbered shards of several splits, all open at once."""

    def __init__(self, dest: Path, max_samples: int, max_bytes: int) -> None:
        self._dest, self._max_samples, self._max_bytes = dest, max_samples, max_bytes
        self._open: dict[str, PartWriter] = {}
        self.parts: dict[str, list[Part]] = {split: [] for split in SPLITS}

    def add(self, split: str, members: list[tuple[str, bytes]]) -> None:
        writer = self._open.get(split)
        if writer is None or not (
            writer.has_room(members, self._max_bytes)
            and writer.part.num_samples < self._max_samples
        ):
            self._finish(split)
            name = shard_name(split, len(self.parts[split])).removesuffix(".tar")
            writer = self._open[split] = PartWriter(self._dest, name)
        writer.add(members)

    def close(self) -> dict[str, list[Part]]:
        for split in SPLITS:
            self._finish(split)
        return {split: parts for split, parts in self.parts.items() if parts}

    def _finish(self, split: str) -> None:
        if split in self._open:
            part = self._open.pop(split).close(next_row=0, is_last=True)
            (self._dest / f"{part.name}.json").unlink()
            self.parts[split].append(part)


def _facts(path: Path, *, looks: bool) -> list[SampleFacts]:
    return [sample_facts(key, members, looks=looks) for _, key, members in read_tar_samples(path)]


def _publish(
    before: ShardReport,
    parts: dict[str, list[Part]],
    repeated: dict[str, tuple[str, str]],
    dest: Path,
) -> ShardReport:
    dropped = Dropped(0, Counter(before.dropped), {k: list(v) for k, v in before.examples.items()})
    for key, (cause, other) in repeated.items():
        dropped.add(key, BadRowError(cause, f"repeats {other}"))
    every = [part for many in parts.values() for part in many]
    media = Counter[str]()
    for part in every:
        media.update(part.num_media)
    report = replace(
        before,
        samples={split: sum(p.num_samples for p in many) for split, many in parts.items()},
        shards={split: [f"{p.name}.tar" for p in many] for split, many in parts.items()},
        num_images=media["images"],
        num_videos=media["videos"],
        num_audios=media["audios"],
        dropped=dict(sorted(dropped.counts.items())),
        examples=dict(sorted(dropped.examples.items())),
    )
    if repeated:
        log.warning("%s: %d repeated samples left out", dest, len(repeated))
    write_report(report, dest)
    return report


def _ratio(split: Iterable[float]) -> str:
    return ",".join(f"{part:g}" for part in split)


def parse_split(text: str) -> tuple[float, float, float]:
    """`9,1,0` as ratios of train, val and test.

    Raises:
        DataError: these are not up to three numbers, none negative and one above 0.
    """
    try:
        parts = [float(part) for part in text.split(",")]
    except ValueError:
        parts = []
    makes_sense = 1 <= len(parts) <= 3 and min(parts) >= 0 and 0 < sum(parts) < math.inf
    if not makes_sense:  # also where one is not a number
        raise DataError(f"split {text!r} is none of train,val,test ratios such as 9,1,0.")
    train, val, test = [*parts, 0.0, 0.0][:3]
    return train, val, test


def iter_samples(shards_dir: Path) -> Iterator[tuple[str, str, dict[str, bytes]]]:
    """Split, key and members of every stored sample, in order."""
    report = read_report(shards_dir)
    for split, names in report.shards.items():
        for name in names:
            for _, key, members in read_tar_samples(shards_dir / name):
                yield split, key, members
