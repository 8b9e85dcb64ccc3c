"""Samples read directly beside those that energon's own reader gives."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.itar import TarIndexWriter
from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader
from megatron.energon.flavors.webdataset.structs import ShardInfo

from vlmcore.dataloading.tar_samples import DirectReader

Member = tuple[str, bytes]
SAMPLES: list[list[Member]] = [
    [("a.json", b"{}"), ("a.0.png", bytes(range(256)) * 5)],
    [("folder/b.json", b"1" * 512), ("folder/b.txt", b"")],
    [("c.json", b"3"), ("c.__meta__/x", b"left out"), ("c.jpg", b"p" * 513)],
]


def write(path: Path, samples: list[list[Member]], *, kind: int = tarfile.USTAR_FORMAT) -> int:
    """A shard and its index, as energon's own preparation leaves them."""
    index = TarIndexWriter(EPath(path))
    with tarfile.open(path, "w", format=kind) as tar:
        for members in samples:
            index.append(tar.offset)
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        index.append(tar.offset)
    index.close()
    return len(samples)


def reader_of(folder: Path, counts: dict[str, int], **options: Any) -> ShardInfosITarReader:
    shards = [
        ShardInfo(name=name, path=EPath(folder / name), count=count)
        for name, count in counts.items()
    ]
    return ShardInfosITarReader(EPath(folder), shards, **options)


def test_samples_are_those_of_energons_reader_whatever_the_order(tmp_path: Path) -> None:
    counts = {name: write(tmp_path / name, SAMPLES) for name in ("0.tar", "1.tar", "2.tar")}
    theirs = reader_of(tmp_path, counts, itar_cache_size=2)
    ours = DirectReader(theirs)
    for index in (0, 8, 1, 4, 3, 8, 7, 2, 5, 6, 0):  # more shards than are held open
        assert ours[index] == theirs[index]
    assert [*ours[5]][-2:] == ["json", "jpg"]


def test_filters_leave_out_what_they_do_in_energon(tmp_path: Path) -> None:
    counts = {"0.tar": write(tmp_path / "0.tar", SAMPLES)}
    options: dict[str, Callable] = {
        "part_filter": lambda part: part != "json",
        "sample_filter": lambda key: key != "0.tar/folder/b",
    }
    theirs = reader_of(tmp_path, counts, **options)
    ours = DirectReader(theirs)
    assert [ours[i] for i in range(3)] == [theirs[i] for i in range(3)]
    assert ours[1] is None
    assert "json" not in ours[0]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("name", ["k" * 90 + "/" + "n" * 60, "é" * 40, "plain"])
def test_every_kind_of_archive_and_name_is_read(tmp_path: Path, kind: int, name: str) -> None:
    members = [(f"{name}.json", b"{}"), (f"{name}.png", b"x" * 700)]
    counts = {"0.tar": write(tmp_path / "0.tar", [members, SAMPLES[0]], kind=kind)}
    theirs = reader_of(tmp_path, counts)
    ours = DirectReader(theirs)
    assert [ours[0], ours[1]] == [theirs[0], theirs[1]]
    assert ours[0]["png"] == b"x" * 700


@pytest.mark.parametrize("at", [0, 124, 130, 156])  # name, size and kind of the second member
def test_a_damaged_header_is_energons_error(tmp_path: Path, at: int) -> None:
    path = tmp_path / "0.tar"
    counts = {"0.tar": write(path, SAMPLES)}
    data = bytearray(path.read_bytes())
    data[1024 + at] ^= 0xFF
    path.write_bytes(data)
    theirs = reader_of(tmp_path, counts)
    with pytest.raises((ValueError, tarfile.TarError)):
        theirs[0]
    with pytest.raises((ValueError, tarfile.TarError)):
        DirectReader(theirs)[0]
