"""Archives are unpacked, and hostile or damaged ones refused with their and the member's name."""

import io
import random
import stat
import subprocess
import sys
import tarfile
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.sources import fetch
from data_prep.sources.archives import Limits, is_archive, settle, unpack
from data_prep.tables import find_tables
from vlmcore.errors import DataError

PICTURE = random.Random(0).randbytes(3000)
CONTENT = {"train.jsonl": b"{}\n", "images/a.png": PICTURE, "images/deep/b.png": PICTURE[::-1]}
SUFFIXES = [".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"]


def pack(path, members):
    """Members are bytes, or a TarInfo or ZipInfo with bytes; a tar's may be (TarInfo, bytes)."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, data in members:
                file.writestr(name, data)
        return path
    mode = {".tar": "w", ".gz": "w:gz", ".tgz": "w:gz", ".bz2": "w:bz2", ".xz": "w:xz"}
    with tarfile.open(path, mode[path.suffix]) as file:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def tar_link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def zip_of_kind(name, kind, data=b""):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (kind | 0o644) << 16
    return info, data


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_was_packed_comes_out(suffix, tmp_path):
    archive = pack(tmp_path / f"set{suffix}", CONTENT.items())
    unpack(archive, tmp_path / "out")
    assert tree(tmp_path / "out") == CONTENT


@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
def test_an_archive_of_a_source_is_unpacked_where_it_lies(suffix, tmp_path):
    source = tmp_path / "mine"
    (source / "part").mkdir(parents=True)
    (source / "train.jsonl").write_bytes(b"{}\n")
    members = {"a/1.png": PICTURE, "a/2.png": PICTURE[::-1]}
    pack(source / "part" / f"images{suffix}", members.items())
    fetch(f"path:{source}", tmp_path / "raw", options={}, seed=0)
    expected = {"train.jsonl": b"{}\n"} | {f"part/{name}": data for name, data in members.items()}
    assert tree(tmp_path / "raw") == expected


def test_a_single_archive_is_a_source(tmp_path):
    pack(tmp_path / "set.zip", CONTENT.items())
    fetch(f"path:{tmp_path / 'set.zip'}", tmp_path / "raw", options={}, seed=0)
    assert tree(tmp_path / "raw") == CONTENT
    assert find_tables(tmp_path / "raw") == {"train": [tmp_path / "raw" / "train.jsonl"]}


def test_a_webdataset_shard_stays_a_tar(tmp_path):
    shard = pack(tmp_path / "0.tar", [("a/1.jpg", PICTURE), ("a/1.json", b"{}")])
    assert not is_archive(shard)
    plain = pack(tmp_path / "1.tar", [("a/1.jpg", PICTURE), ("a/2.jpg", b"{}")])
    assert is_archive(plain)
    fetch(f"path:{shard}", tmp_path / "raw", options={}, seed=0)
    assert tree(tmp_path / "raw") == {"0.tar": shard.read_bytes()}
    assert find_tables(tmp_path / "raw") == {"train": [tmp_path / "raw" / "0.tar"]}


OUT = "leads out of the dataset's folder"
NO_FILE = "neither a file nor a folder"
HOSTILE = {
    "parent.tar": ([("../evil", b"x")], "'../evil'", OUT),
    "deep.tar.gz": ([("a/../../evil", b"x")], "'a/../../evil'", OUT),
    "absolute.tar": ([("/tmp/evil", b"x")], "'/tmp/evil'", OUT),
    "parent.zip": ([("../evil", b"x")], "'../evil'", OUT),
    "absolute.zip": ([("/tmp/evil", b"x")], "'/tmp/evil'", OUT),
    "windows.zip": ([("..\\evil", b"x")], "evil'", OUT),
    "symlink.tar": ([tar_link("a", "../../evil")], "'a'", "a link that leads out"),
    "absolute-link.tar": ([tar_link("a", "/etc/passwd")], "'a'", "a link that leads out"),
    "hardlink.tar": ([tar_link("a", "../b", tarfile.LNKTYPE)], "'a'", "a link that leads out"),
    "folder-link.tar": ([tar_link("d", "."), ("d/x", b"x")], "'d'", "a link"),
    "dangling.tar": ([tar_link("a", "b")], "'a'", "no file that came before"),
    "symlink.zip": ([zip_of_kind("a", stat.S_IFLNK, b"../../evil")], "'a'", "link that leads out"),
    "long-link.zip": ([zip_of_kind("a", stat.S_IFLNK, b"x" * 9999)], "'a'", NO_FILE),
    "device.tar": ([tar_link("a", "", tarfile.CHRTYPE)], "'a'", NO_FILE),
    "fifo.tar": ([tar_link("a", "", tarfile.FIFOTYPE)], "'a'", NO_FILE),
    "block.tar": ([tar_link("a", "", tarfile.BLKTYPE)], "'a'", NO_FILE),
    "fifo.zip": ([zip_of_kind("a", stat.S_IFIFO)], "'a'", NO_FILE),
    "twice.tar": ([("a", b"x"), ("a", b"y")], "'a'", "take the place of another file"),
    "file-as-folder.tar": ([("a", b"x"), ("a/b", b"y")], "'a/b'", "take the place of another file"),
    "long-name.tar": ([("a/" + "é" * 200, b"x")], "'a/é", "a name too long"),
    "latin-1.tar": ([("caf\udce9.png", b"x")], "'caf", "a name that is no UTF-8"),
    "nameless.tar": ([(".", b"x")], "'.'", OUT),
    "zeros.zip": ([("a", bytes(3_000_000))], "'a'", "is part of a bomb"),
    "zeros.tar.gz": ([("a", b"x"), ("b", bytes(3_000_000))], "'b'", "is part of a bomb"),
    "huge.tar": ([("a", bytes(9_000_000))], "'a'", "grows past the 8000000 bytes"),
    "many.tar": ([(f"{n}", b"") for n in range(60)], "'50'", "more than the 50 members"),
    "many.zip": ([(f"{n}", b"") for n in range(60)], "'50'", "more than the 50 members"),
}
SMALL = Limits(max_members=50, max_bytes=8_000_000, max_ratio=100, min_bomb_bytes=2_000_000)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_and_nothing_leaves_the_folder(name, tmp_path):
    members, member, cause = HOSTILE[name]
    archive = pack(tmp_path / name, members)
    out = tmp_path / "deep" / "out"
    with pytest.raises(DataError) as error:
        unpack(archive, out, limits=SMALL)
    assert name in str(error.value) and member in str(error.value) and cause in str(error.value)
    outside = {path for path in tmp_path.rglob("*") if path.is_file()} - {archive}
    assert all(path.is_relative_to(out) and not path.is_symlink() for path in outside)


def test_links_to_files_inside_become_those_files(tmp_path):
    members = [
        ("a/x.png", PICTURE),
        tar_link("a/y.png", "x.png"),
        tar_link("b/z.png", "../a/x.png"),
    ]
    members.append(tar_link("h.png", "a/x.png", tarfile.LNKTYPE))
    unpack(pack(tmp_path / "set.tar", members), tmp_path / "out")
    names = ("a/x.png", "a/y.png", "b/z.png", "h.png")
    assert tree(tmp_path / "out") == dict.fromkeys(names, PICTURE)
    linked = [("x.png", PICTURE), zip_of_kind("y.png", stat.S_IFLNK, b"x.png")]
    unpack(pack(tmp_path / "set.zip", linked), tmp_path / "zip")
    assert tree(tmp_path / "zip") == dict.fromkeys(("x.png", "y.png"), PICTURE)
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


def test_an_encrypted_member_is_refused(tmp_path):
    data = bytearray(pack(tmp_path / "set.zip", [("secret.txt", b"x")]).read_bytes())
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + at] |= 1
    (tmp_path / "set.zip").write_bytes(data)
    with pytest.raises(DataError, match="set.zip: 'secret.txt' is encrypted"):
        unpack(tmp_path / "set.zip", tmp_path / "out")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_cut_archive_is_never_taken_for_a_whole_one(suffix, tmp_path):
    archive = pack(tmp_path / f"set{suffix}", CONTENT.items())
    whole = archive.read_bytes()
    end = len(whole) if suffix != ".tar" else 3 * 512 + 3 * 3072 + 512  # the rest is padding
    for keep in (0, 100, 512, 1024, 2000, end // 2, end - 600, end - 30):
        archive.write_bytes(whole[: max(0, keep)])
        out = tmp_path / f"out{keep}"
        out.mkdir()
        try:
            unpack(archive, out)
        except DataError as error:
            assert archive.name in str(error) and "is damaged" in str(error)
        else:
            assert tree(out) == CONTENT


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), suffix=st.sampled_from([".zip", ".tar", ".tar.gz"]))
def test_flipped_bytes_give_the_content_or_a_named_fault(data, suffix, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flipped")
    archive = pack(folder / f"set{suffix}", CONTENT.items())
    content = bytearray(archive.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    archive.write_bytes(content)
    try:
        unpack(archive, folder / "out")
    except DataError as error:
        assert archive.name in str(error)
    else:  # a plain tar has checksums of its headers alone
        assert suffix == ".tar" or tree(folder / "out") == CONTENT
    for path in folder.rglob("*"):
        inside = path.is_relative_to(folder / "out") or path == archive
        assert inside and not path.is_symlink()


def test_a_file_that_is_already_there_is_kept_if_it_is_the_same(tmp_path):
    archive = pack(tmp_path / "set.zip", CONTENT.items())
    out = tmp_path / "out"
    (out / "images").mkdir(parents=True)
    (out / "images" / "a.png").write_bytes(PICTURE)
    unpack(archive, out)
    assert tree(out) == CONTENT
    (out / "images" / "a.png").write_bytes(b"mine")
    with pytest.raises(DataError, match="'images/a.png' would take the place of another file"):
        unpack(archive, out)
    assert (out / "images" / "a.png").read_bytes() == b"mine"


def test_a_source_whose_names_lead_out_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"x")
    with pytest.raises(DataError, match="'../x' leads out"):
        settle({"../x": tmp_path / "x"}, tmp_path / "dest", scratch=tmp_path / "none")


PEAK = """
import sys, tracemalloc
from pathlib import Path
from data_prep.sources import archives
archives._CHUNK_BYTES = 1000
archive, out = map(Path, sys.argv[1:])
archives.unpack(archive, out / "warm")
tracemalloc.start()
archives.unpack(archive, out / "measured")
print(tracemalloc.get_traced_memory()[1])
"""


def test_memory_does_not_grow_with_the_number_of_members(tmp_path):
    archive = pack(tmp_path / "set.tar", [(f"{n:06d}.txt", b"x") for n in range(3000)])
    command = [sys.executable, "-c", PEAK, str(archive), str(tmp_path / "out")]
    peak = int(subprocess.run(command, check=True, capture_output=True).stdout)
    assert peak < 300_000  # 50 kB as things are; 3000 kept TarInfos are more than 1 MB
    assert len(tree(tmp_path / "out" / "measured")) == 3000
