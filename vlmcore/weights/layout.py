"""How a torch_dist checkpoint of Megatron-Core is laid out; written without a model, without torch.

The layout is torch.distributed.checkpoint's plus Megatron's `metadata.json` and `common.pt`
(torch 2.13, megatron-core 0.16): one global tensor per key, chunks at offsets, each an archive of
`torch.save` inside a `.distcp` file, and a `_extra_state` object per linear layer that holds
`[None]` where TransformerEngine is absent. `torch_dist` reads them.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmcore.weights import pickles
from vlmcore.weights.archives import ALIGNMENT, archive_ends, archive_of, contiguous
from vlmcore.weights.boxes import swap
from vlmcore.weights.dtypes import itemsize

Shape = tuple[int, ...]

MAX_FILE_BYTES = 1 << 29  # of one .distcp, so that workers write into different ones; a larger
# tensor gets a file of its own
_LINEAR = re.compile(r".*decoder\.layers\..*linear_(?:qkv|proj|fc1|fc2)\.weight")
_OBJECTS = "__0_objects.distcp"
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Box:
    """A part of a global tensor, stored as one chunk.

    Attributes:
        swapped: Its last two dimensions are stored the other way round.
    """

    key: str
    global_shape: Shape
    offset: Shape
    shape: Shape
    dtype: str
    swapped: bool = False

    def archive_ends(self) -> tuple[bytes, bytes]:
        """What stands before and after its data."""
        stride = contiguous(self.shape)
        if self.swapped:
            stride = swap(contiguous(swap(self.shape)))
        return archive_ends(self.dtype, self.shape, stride)


@dataclass(frozen=True)
class Place:
    """Where an archive stands: `length` bytes from `start` on in a file of the checkpoint."""

    file: str
    start: int
    length: int


def place_boxes(boxes: Sequence[Box]) -> list[Place]:
    """Where each box's archive goes; depends on nothing but the boxes."""
    places: list[Place] = []
    file, end = 0, 0
    for box in boxes:
        head, tail = box.archive_ends()
        length = len(head) + math.prod(box.shape) * itemsize(box.dtype) + len(tail)
        start = -(-end // ALIGNMENT) * ALIGNMENT
        if end and start + length > MAX_FILE_BYTES:
            file, start = file + 1, 0
        places.append(Place(f"__0_{file}.distcp", start, length))
        end = start + length
    return places


def write_metadata(folder: Path, placed: Mapping[Box, Place]) -> None:
    """Writes all that makes the placed archives a checkpoint of Megatron-Core."""
    extra_state = archive_of(pickles.listing([pickles.NONE]))  # what a linear layer's is
    (folder / _OBJECTS).write_bytes(extra_state)
    (folder / "common.pt").write_bytes(archive_of(pickles.mapping([])))
    (folder / "metadata.json").write_text(json.dumps(_BACKEND))
    by_key: dict[str, list[Box]] = defaultdict(list)
    for box in placed:
        by_key[box.key].append(box)
    entries = [(pickles.text(key), _tensor(boxes)) for key, boxes in by_key.items()]
    storage = [(_index(box.key, box.offset), _stored(place)) for box, place in placed.items()]
    for key in _extra_states(placed):
        entries.append((pickles.text(key), pickles.instance(_metadata("BytesStorageMetadata"))))
        storage.append((_index(key), _stored(Place(_OBJECTS, 0, len(extra_state)))))
    metadata = pickles.with_fields(
        _metadata("Metadata"),
        state_dict_metadata=pickles.mapping(entries),
        storage_data=pickles.mapping(storage),
    )
    (folder / ".metadata").write_bytes(pickles.whole(metadata))


def _extra_states(boxes: Mapping[Box, Place]) -> Iterator[str]:
    """Keys of the objects that Megatron's linear layers ask for, one per index of their stack."""
    stacks = {box.key: box.global_shape[:-2] for box in boxes if _LINEAR.fullmatch(box.key)}
    for key, stack in stacks.items():
        of = ".".join(map(str, stack))
        for index in itertools.product(*map(range, stack)):
            shard = ".".join(map(str, index))
            yield f"{key.removesuffix('weight')}_extra_state/shard_{shard}_{of}"


# -- the objects of torch.distributed.checkpoint, as torch pickles them ----------------------------


def _metadata(name: str) -> bytes:
    return pickles.named("torch.distributed.checkpoint.metadata", name)


def _tensor(boxes: Sequence[Box]) -> bytes:
    """TensorStorageMetadata of a global tensor stored in these boxes."""
    properties = pickles.sequence(
        pickles.named("torch", boxes[0].dtype),
        pickles.call(
            pickles.named("torch.serialization", "_get_layout"), pickles.text("torch.strided")
        ),
        pickles.FALSE,  # requires_grad
        pickles.call(_metadata("_MEM_FORMAT_ENCODING"), pickles.number(0)),  # contiguous
        pickles.FALSE,  # pin_memory
    )
    return pickles.with_fields(
        _metadata("TensorStorageMetadata"),
        properties=pickles.instance(_metadata("TensorProperties"), properties),
        size=_size(boxes[0].global_shape),
        chunks=pickles.listing(
            pickles.with_fields(
                _metadata("ChunkStorageMetadata"), offsets=_size(box.offset), sizes=_size(box.shape)
            )
            for box in boxes
        ),
    )


def _index(key: str, offset: Shape | None = None) -> bytes:
    fields = {} if offset is None else {"offset": _size(offset)}
    return pickles.with_fields(
        _metadata("MetadataIndex"), fqn=pickles.text(key), index=pickles.NONE, **fields
    )


def _stored(place: Place) -> bytes:
    return pickles.with_fields(
        pickles.named("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        relative_path=pickles.text(place.file),
        offset=pickles.number(place.start),
        length=pickles.number(place.length),
    )


def _size(shape: Shape) -> bytes:
    return pickles.call(pickles.named("torch", "Size"), pickles.numbers(shape))
