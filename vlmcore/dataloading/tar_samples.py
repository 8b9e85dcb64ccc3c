"""Samples out of local shards, read with one call each.

Energon 7.4 reads through `tarfile` and a storage client that counts every read; for small samples
that takes longer than to encode them. Whatever is not a plain file under a short name, or does not
add up, goes to energon's own reader, which knows all kinds of archives and says what is wrong.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron.energon.flavors.webdataset.config import skip_meta_re, split_name_re
from megatron.energon.flavors.webdataset.itar import ITAR_SUFFIX
from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader
from megatron.energon.flavors.webdataset.sample_loader import WebdatasetSampleLoaderDataset
from megatron.energon.flavors.webdataset.structs import FilteredSample
from megatron.energon.source_info import SourceInfo
from megatron.energon.wrappers.base import BaseWrapperDataset

_BLOCK = 512  # bytes; a header is one, contents fill whole ones
_NAME, _SIZE, _KIND, _PREFIX = slice(0, 100), slice(124, 135), 156, 345  # of a header (POSIX pax)
_PLAIN_FILE = ord("0")


def read_shards_directly(dataset: Any) -> None:
    """Makes the sources of a dataset read local shards with as few calls as there can be.

    Args:
        dataset: Energon's, with its wrappers, before it is first read.
    """
    if isinstance(dataset, BaseWrapperDataset):
        for inner in dataset.datasets:
            read_shards_directly(inner)
    elif isinstance(dataset, WebdatasetSampleLoaderDataset):
        dataset.join_readers = [
            DirectReader(reader) if _is_local(reader) else reader for reader in dataset.join_readers
        ]


class DirectReader:
    """`reader[index]` is the sample that energon's reader gives.

    Args:
        reader: Of local shards.
    """

    def __init__(self, reader: ShardInfosITarReader) -> None:
        self._reader = reader
        self._paths = [shard.path.local_path() for shard in reader.shard_infos]
        self._shard = lru_cache(reader.itar_cache_size)(_Shard)

    def __getitem__(self, index: int) -> FilteredSample | None:
        """The sample; None where the dataset's settings leave it out."""
        before = self._reader.shard_count_cumsum
        position = bisect_right(before, index) - 1
        members = self._shard(self._paths[position]).members(index - before[position])
        return self._sample(index, self._reader.shard_infos[position].name, members)

    def _sample(
        self, index: int, shard: str, members: Sequence[tuple[str, bytes]]
    ) -> FilteredSample | None:
        parts: dict[str, Any] = {}
        names, keys = [], set()
        for name, content in members:
            found = None if skip_meta_re.match(name) else split_name_re.match(name)
            if found is None:
                continue
            key, part = found.groups()
            keys.add(key)
            if self._reader.part_filter is None or self._reader.part_filter(part):
                parts[part] = content
                names.append(name)
        if len(keys) != 1:
            return self._reader[index]
        (key,) = keys
        if self._reader.sample_filter is not None and not self._reader.sample_filter(
            f"{shard}/{key}"
        ):
            return None
        source = SourceInfo(
            dataset_path=self._reader.base_path,
            index=index,
            shard_name=shard,
            file_names=tuple(names),
        )
        return FilteredSample(
            __key__=key,
            __shard__=shard,
            __restore_key__=("Webdataset", index),
            __sources__=(source,),
            **parts,
        )


class _Shard:
    """An open tar file and where its samples begin."""

    def __init__(self, path: Path) -> None:
        self._offsets = array("Q")  # bytes, of each sample and of the end
        self._offsets.frombytes(path.with_suffix(ITAR_SUFFIX).read_bytes())
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        os.close(self._file)

    def members(self, index: int) -> list[tuple[str, bytes]]:
        """(name, content) of a sample's files; none where they are not plain files alone."""
        start, end = self._offsets[index : index + 2]
        data = os.pread(self._file, end - start, start)
        found = []
        at = 0
        while at + _BLOCK <= len(data):
            header = data[at : at + _BLOCK]
            if header[_KIND] != _PLAIN_FILE or header[_PREFIX]:
                return []
            try:
                size = int(header[_SIZE], 8)
                name = header[_NAME].partition(b"\0")[0].decode()
            except ValueError:
                return []
            at += _BLOCK
            found.append((name, data[at : at + size]))
            at += -(-size // _BLOCK) * _BLOCK
        return found if at == end - start else []


def _is_local(reader: Any) -> bool:
    return type(reader) is ShardInfosITarReader and all(
        shard.path.is_local() for shard in reader.shard_infos
    )
