import io
import tarfile

import pytest

from data_prep.tars import padding, read_tar_samples, tar_end, tar_header, tar_size


@pytest.mark.parametrize("name", ["a.json", "train-000001.0.png", "x" * 99 + "é", "長い名前.jpg"])
@pytest.mark.parametrize("size", [0, 1, 511, 512, 123_456_789, 8**11 - 1])
def test_a_header_is_the_one_that_tarfile_writes(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    if len(name.encode()) > 100:
        expected = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")
    else:
        expected = info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
    assert tar_header(name, size) == expected


def test_members_come_back_under_their_keys_with_the_place_they_begin_at(tmp_path):
    parts = [("a.json", b"{}"), ("a.0.png", b"x" * 700), ("b.json", b"[]")]
    data = b"".join(tar_header(n, len(d)) + d + padding(len(d)) for n, d in parts)
    path = tmp_path / "made.tar"
    path.write_bytes(data + tar_end(len(data)))
    assert path.stat().st_size % tarfile.RECORDSIZE == 0
    found = list(read_tar_samples(path))
    b_starts = tar_size(2) + tar_size(700)
    assert found == [
        (0, "a", {"json": b"{}", "0.png": b"x" * 700}),
        (b_starts, "b", {"json": b"[]"}),
    ]
    assert [key for _, key, _ in read_tar_samples(path, offset=b_starts)] == ["b"]
    with tarfile.open(path) as tar:
        assert tar.extractfile("a.0.png").read() == b"x" * 700


def test_what_is_no_file_is_passed_over(tmp_path):
    path = tmp_path / "made.tar"
    kinds = {"b.txt": tarfile.SYMTYPE}
    with tarfile.open(path, "w") as tar:
        for name in ("a.txt", "b.txt", ".hidden.txt", "plain"):
            kind = kinds.get(name, tarfile.REGTYPE)
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/hostname"
            info.size = 2 if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(b"hi"))
    assert [key for _, key, _ in read_tar_samples(path)] == ["a"]
