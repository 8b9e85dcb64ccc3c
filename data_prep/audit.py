"""What finished shards hold: sizes, lengths, repeats, samples to look at, and suspected leakage."""

import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType

from PIL import Image

from data_prep.conversation import TAGS
from data_prep.duplicates import NearIndex, SampleFacts, find_duplicates, sample_facts
from data_prep.images import DECODE_ERRORS
from data_prep.rows import IMAGE_MEMBERS
from data_prep.shards import ShardReport, read_report
from data_prep.tars import read_tar_samples
from data_prep.workers import mapper

log = logging.getLogger(__name__)

NUM_SAMPLES = 16
MAX_EXAMPLES = 20
BYTES_PER_TOKEN = 4  # of English text in the vocabularies of these models
IMAGE_TOKEN_PX = 28  # a merged patch of Qwen2.5-VL; Qwen3-VL's is 32

CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class ImageFacts:
    """Width and height in pixels of a stored image, and its perceptual hash if it decodes."""

    width: int
    height: int
    look: int | None


@dataclass(frozen=True)
class StoredSample:
    """What the audit keeps of a sample."""

    split: str
    facts: SampleFacts
    sizes: tuple[tuple[int, int], ...]  # (width, height) of each image
    num_turns: int
    num_tokens: int
    num_undecodable: int


@dataclass(frozen=True)
class Shown:
    """A sample to look at: its turns and its images as they are stored."""

    split: str
    key: str
    messages: list[dict]
    images: list[tuple[str, bytes]]  # member name, bytes


@dataclass
class Audit:
    """Everything that the page shows."""

    report: ShardReport
    is_token_estimate: bool
    num_tokens: list[int] = field(default_factory=list)
    num_turns: Counter[int] = field(default_factory=Counter)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    undecodable: list[str] = field(default_factory=list)
    duplicates: dict[str, tuple[str, str]] = field(default_factory=dict)
    num_held_out: int = 0  # images and videos that train was searched for
    leaks: list[tuple[str, str, str]] = field(default_factory=list)  # train key, where, why
    shown: list[Shown] = field(default_factory=list)

    def figures(self) -> dict:
        """The counts as JSON values."""
        causes = Counter(cause for cause, _ in self.duplicates.values())
        return {
            "samples": self.report.samples,
            "images": len(self.sizes),
            "dropped": self.report.dropped,
            "undecodable": len(self.undecodable),
            "duplicates": causes["duplicate"],
            "near_duplicates": causes["near_duplicate"],
            "held_out_media": self.num_held_out,
            "leaks": len({key for key, _, _ in self.leaks}),
            "tokens": sum(self.num_tokens),
            "tokens_are_estimated": self.is_token_estimate,
            "longest_sample_tokens": max(self.num_tokens, default=0),
        }


def audit_shards(
    shards_dir: Path,
    *,
    against: Mapping[str, Path] = MappingProxyType({}),
    count_tokens: CountTokens | None = None,
    num_workers: int = 1,
) -> Audit:
    """Read every sample, decode every image.

    Args:
        against: name → folder of holdouts or other shards that train must not have seen; the
            dataset's own val and test are always looked at.
        count_tokens: tokens of a text; None: estimated from its bytes.
        num_workers: processes, each at one shard.

    Raises:
        DataError: the folder holds no finished shards.
    """
    report = read_report(shards_dir)
    tars = [(split, shards_dir / name) for split in report.shards for name in report.shards[split]]
    with mapper(num_workers) as run:
        # a tokenizer is not sent to processes: texts are counted by the one that has it
        read = partial(_read_shard, count_tokens=count_tokens)
        listed = list((map if count_tokens else run)(read, tars))
    samples = [one for many in listed for one in many]
    found = Audit(report, is_token_estimate=count_tokens is None)
    found.num_tokens = [one.num_tokens for one in samples]
    found.num_turns.update(one.num_turns for one in samples)
    found.sizes = [size for one in samples for size in one.sizes]
    found.undecodable = [one.facts.key for one in samples if one.num_undecodable]
    found.duplicates = find_duplicates([one.facts for one in samples], near=True)
    found.leaks, found.num_held_out = _leaks(samples, against)
    found.shown = _shown(shards_dir, report)
    return found


def _read_shard(tar: tuple[str, Path], *, count_tokens: CountTokens | None) -> list[StoredSample]:
    split, path = tar
    return [
        _stored(split, key, members, count_tokens or _estimate_tokens)
        for _, key, members in read_tar_samples(path)
    ]


def _stored(
    split: str, key: str, members: dict[str, bytes], count_tokens: CountTokens
) -> StoredSample:
    facts = sample_facts(key, members, looks=True)
    messages = json.loads(members["json"])["messages"]
    images = [data for name, data in members.items() if _is_image(name)]
    sizes = tuple(size for size in map(_size, images) if size is not None)
    text = "".join(turn["content"] for turn in messages)
    for tag in TAGS.values():
        text = text.replace(tag, "")
    in_images = sum(
        -(-width // IMAGE_TOKEN_PX) * -(-height // IMAGE_TOKEN_PX) for width, height in sizes
    )
    return StoredSample(
        split=split,
        facts=facts,
        sizes=sizes,
        num_turns=len(messages),
        num_tokens=count_tokens(text) + in_images,
        num_undecodable=len(images) - len(facts.looks),
    )


def _leaks(
    samples: Iterable[StoredSample], against: Mapping[str, Path]
) -> tuple[list[tuple[str, str, str]], int]:
    """Train samples whose image is also held out: (key, where it is, how alike); how many are."""
    train, exact, near = [], dict[bytes, str](), NearIndex()
    where: dict[int, str] = {}
    for one in samples:
        if one.split == "train":
            train.append(one.facts)
            continue
        _remember(one.facts.media, one.facts.looks, one.facts.key, exact, near, where)
    for held_out, folder in against.items():
        for key, media, looks in _held_out(folder):
            _remember(media, looks, f"{held_out}/{key}", exact, near, where)
    found = []
    for facts in train:
        for digest in facts.media:
            if digest in exact:
                found.append((facts.key, exact[digest], "the same bytes"))
                break
        else:
            looks = (near.find(look) for look in facts.looks)
            look = next((one for one in looks if one is not None), None)
            if look is not None:
                found.append((facts.key, where[look], "looks the same"))
    return found, len(exact)


def _remember(
    media: Iterable[bytes],
    looks: Iterable[int],
    name: str,
    exact: dict[bytes, str],
    near: NearIndex,
    where: dict[int, str],
) -> None:
    for digest in media:
        exact.setdefault(digest, name)
    for look in looks:
        near.add(look)
        where.setdefault(look, name)


def _held_out(folder: Path) -> Iterable[tuple[str, tuple[bytes, ...], tuple[int, ...]]]:
    """Images of a holdout's `images/`, or of every sample of other shards."""
    if (folder / "images").is_dir():
        for file in sorted((folder / "images").iterdir()):
            members = {"json": b'{"messages":[]}', f"0{file.suffix}": file.read_bytes()}
            facts = sample_facts(file.stem, members, looks=True)
            yield facts.key, facts.media, facts.looks
        return
    for names in read_report(folder).shards.values():
        for name in names:
            for _, key, members in read_tar_samples(folder / name):
                facts = sample_facts(key, members, looks=True)
                yield key, facts.media, facts.looks


def _shown(shards_dir: Path, report: ShardReport) -> list[Shown]:
    """Samples at even steps over all shards."""
    total = sum(report.samples.values())
    wanted = {i * total // NUM_SAMPLES for i in range(NUM_SAMPLES)}
    found, number = [], 0
    for split, names in report.shards.items():
        for name in names:
            for _, key, members in read_tar_samples(shards_dir / name):
                if number in wanted:
                    images = [(m, data) for m, data in members.items() if _is_image(m)]
                    messages = json.loads(members["json"])["messages"]
                    found.append(Shown(split, key, messages, images))
                number += 1
    return found


def _size(data: bytes) -> tuple[int, int] | None:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except DECODE_ERRORS:
        return None


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2] in IMAGE_MEMBERS


def _estimate_tokens(text: str) -> int:
    return -(-len(text.encode()) // BYTES_PER_TOKEN)
