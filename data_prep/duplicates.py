"""What makes samples and images the same, exactly and to the eye."""

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_prep.images import DECODE_ERRORS
from data_prep.rows import IMAGE_MEMBERS

HASH_SIDE = 8  # dHash of 8 x 8 bits in each direction
HASH_BITS = 2 * HASH_SIDE * HASH_SIDE
NEAR_BITS = 3  # as many of them may differ between images that look the same
BANDS = NEAR_BITS + 1  # two hashes within NEAR_BITS agree in one of so many bands


@dataclass(frozen=True)
class SampleFacts:
    """What is known of a stored sample without keeping it.

    Attributes:
        texts: digest of its conversation.
        media: digests of its media, in their order.
        looks: perceptual hashes of its images, where they were asked for.
        group: value of the group column.
    """

    key: str
    texts: bytes
    media: tuple[bytes, ...]
    looks: tuple[int, ...] = ()
    group: str | None = None


def sample_facts(key: str, members: dict[str, bytes], *, looks: bool) -> SampleFacts:
    """Digests of a stored sample; `looks` decodes its images for their perceptual hashes."""
    conversation = json.loads(members["json"])
    texts = json.dumps([conversation["messages"], conversation.get("rejected_messages")])
    media = {name: data for name, data in members.items() if name != "json"}
    hashes: list[int] = []
    if looks:
        found = [_look(data) for name, data in media.items() if _is_image(name)]
        hashes = [one for one in found if one is not None]
    return SampleFacts(
        key,
        _digest(texts.encode()),
        tuple(_digest(data) for data in media.values()),
        tuple(hashes),
        conversation.get("group"),
    )


def perceptual_hash(image: Image.Image) -> int:
    """dHash: whether each of 8 x 8 areas is brighter than its right, then its lower neighbour.

    Scaling, recompression and small changes of colour leave nearly all 128 bits as they are.
    """
    grey = image.convert("L")
    wide, high = (
        np.asarray(grey.resize(size, Image.Resampling.BOX), dtype=np.int16)
        for size in ((HASH_SIDE + 1, HASH_SIDE), (HASH_SIDE, HASH_SIDE + 1))
    )
    bits = np.concatenate([(wide[:, 1:] > wide[:, :-1]).ravel(), (high[1:] > high[:-1]).ravel()])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


class NearIndex:
    """Finds a perceptual hash seen before that differs in at most NEAR_BITS bits."""

    def __init__(self) -> None:
        self._bands: list[dict[int, list[int]]] = [{} for _ in range(BANDS)]

    def find(self, look: int) -> int | None:
        """Such a hash, or None."""
        for band, part in zip(self._bands, _parts(look), strict=True):
            for other in band.get(part, ()):
                if (look ^ other).bit_count() <= NEAR_BITS:
                    return other
        return None

    def add(self, look: int) -> None:
        """Remember a hash."""
        for band, part in zip(self._bands, _parts(look), strict=True):
            listed = band.setdefault(part, [])
            if look not in listed:
                listed.append(look)

    def canonical(self, look: int) -> int:
        """The hash seen first of those that look the same."""
        found = self.find(look)
        if found is None:
            self.add(look)
        return look if found is None else found


def find_duplicates(facts: Iterable[SampleFacts], *, near: bool) -> dict[str, tuple[str, str]]:
    """Key of a sample → cause and key of the one before it that it repeats.

    A sample repeats another where all texts are the same and all media are, byte for byte
    (`duplicate`) or, with `near`, where their images look the same (`near_duplicate`).
    """
    exact: dict[tuple, str] = {}
    similar: dict[tuple, str] = {}
    index, found = NearIndex(), {}
    for one in facts:
        identity = (one.texts, one.media)
        if identity in exact:
            found[one.key] = ("duplicate", exact[identity])
            continue
        exact[identity] = one.key
        if near and one.looks and len(one.looks) == len(one.media):
            look = (one.texts, tuple(index.canonical(look) for look in one.looks))
            if look in similar:
                found[one.key] = ("near_duplicate", similar[look])
            else:
                similar[look] = one.key
    return found


def _parts(look: int) -> Sequence[int]:
    width = HASH_BITS // BANDS
    return [(look >> (width * i)) & ((1 << width) - 1) for i in range(BANDS)]


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2] in IMAGE_MEMBERS


def _look(data: bytes) -> int | None:
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.draft("L", (64, 64))  # a JPEG is then decoded at a fraction of its size
            return perceptual_hash(image)
    except DECODE_ERRORS:  # the structure was right, the pixels are not: the audit counts them
        return None
