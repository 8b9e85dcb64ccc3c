"""Inputs as bad as they come, each with the cause that it must be counted under."""

import base64
import io
import json
import os
import struct
import zlib

import pytest
from PIL import Image

from data_prep.causes import CAUSES, BadRowError
from data_prep.formats import RowFormat
from data_prep.images import check_image
from data_prep.jpeg import walk_jpeg
from data_prep.rows import row_ranges
from data_prep.samples import RawSample, RowReader, read_samples
from tests.data_prep.conftest import gradient


def encoded(kind, size=(40, 30), **options):
    out = io.BytesIO()
    gradient(*size).save(out, kind, **options)
    return out.getvalue()


PNG, JPEG = encoded("PNG"), encoded("JPEG", quality=90)
PROGRESSIVE = encoded("JPEG", progressive=True)
WEBP, GIF, BMP, TIFF = (encoded(kind) for kind in ("WEBP", "GIF", "BMP", "TIFF"))


def chunk(kind, data, crc=None):
    crc = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def png(width, height, *, depth=8, colour=2, pixels=b"\0" * 99):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def flipped(data, at):
    changed = bytearray(data)
    changed[at] ^= 0x40
    return bytes(changed)


def jpeg_at(marker, offset):
    """JPEG with a bit flipped `offset` bytes behind the first such marker."""
    return flipped(JPEG, JPEG.index(bytes([0xFF, marker])) + offset)


# bytes of the only image of an otherwise good row → cause
IMAGES = {
    "nothing": (b"", "corrupt_image"),
    "one byte": (b"\xff", "corrupt_image"),
    "text": (b"<html>404 Not Found</html>", "corrupt_image"),
    "a git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "corrupt_image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "corrupt_image"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "corrupt_image"),
    "a zip": (b"PK\x03\x04" + bytes(60), "corrupt_image"),
    "zeros": (bytes(5000), "corrupt_image"),
    "png: signature alone": (PNG[:8], "corrupt_image"),
    "png: cut in its header": (PNG[:20], "truncated_image"),
    "png: cut in its pixels": (PNG[: len(PNG) // 2], "truncated_image"),
    "png: without its end": (PNG[:-40], "truncated_image"),
    "png: bit flipped in the signature": (flipped(PNG, 1), "corrupt_image"),
    "png: bit flipped in the width": (flipped(PNG, 18), "corrupt_image"),
    "png: bit flipped in the pixels": (flipped(PNG, len(PNG) // 2), "corrupt_image"),
    "png: bit flipped in a checksum": (flipped(PNG, -14), "corrupt_image"),
    "png: zero wide": (png(0, 5), "corrupt_image"),
    "png: 3 bits deep": (png(4, 4, depth=3), "corrupt_image"),
    "png: no pixels": (PNG[:33] + chunk(b"IEND", b""), "corrupt_image"),
    "png: a bomb": (png(100_000, 100_000), "decompression_bomb"),
    "png: a bomb within a side": (png(20_000, 20_000), "decompression_bomb"),
    "png: a line": (png(3000, 1, pixels=b"\0" * 9001), "absurd_size"),
    "png: a chunk longer than the file": (PNG[:33] + struct.pack(">I", 2**30) + PNG[37:],
                                          "truncated_image"),
    "jpeg: cut in its pixels": (JPEG[: len(JPEG) * 2 // 3], "truncated_image"),
    "jpeg: without its last two bytes": (JPEG[:-2], "truncated_image"),
    "jpeg: cut in its tables": (JPEG[:100], "truncated_image"),
    "jpeg: start alone": (b"\xff\xd8\xff\xe0", "corrupt_image"),
    "jpeg: end right after the start": (b"\xff\xd8\xff\xd9", "corrupt_image"),
    "jpeg: zeros for pixels and end": (JPEG[:-300] + bytes(300), "truncated_image"),
    "jpeg: bit flipped in the start": (flipped(JPEG, 1), "corrupt_image"),
    "jpeg: bit flipped in the precision": (jpeg_at(0xC0, 4), "corrupt_image"),
    "jpeg: absurd height": (JPEG.replace(struct.pack(">HH", 30, 40), struct.pack(">HH", 65500, 40)),
                            "absurd_size"),
    "jpeg: a bomb": (JPEG.replace(struct.pack(">HH", 30, 40), struct.pack(">HH", 60000, 60000)),
                     "decompression_bomb"),
    "progressive jpeg: cut": (PROGRESSIVE[: len(PROGRESSIVE) // 2], "truncated_image"),
    "webp: cut": (WEBP[: len(WEBP) // 2], "corrupt_image"),
    "webp: bit flipped in its header": (flipped(WEBP, 9), "corrupt_image"),
    "gif: cut": (GIF[: len(GIF) // 2], "truncated_image"),
    "bmp: cut": (BMP[: len(BMP) // 2], "truncated_image"),
    "tiff: cut": (TIFF[: len(TIFF) // 2], "truncated_image"),
}  # fmt: skip


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def asked(question="<image>What?", answer="A cat.", **fields):
    return {"messages": turns(("user", question), ("assistant", answer)), **fields}


OWN = {"images": ["a.png"]}
# a line of JSONL → cause
LINES = {
    "cut": (b'{"messages": [{"role": "user"', "bad_json"),
    "two objects": (b'{"a": 1} {"b": 2}', "bad_json"),
    "single quotes": (b"{'messages': []}", "bad_json"),
    "a trailing comma": (b'{"messages": [],}', "bad_json"),
    "not UTF-8": (b'{"messages": "\xff\xfe"}', "bad_json"),
    "a control character": (b'{"messages": "\x01"}', "bad_json"),
    "nested too deep": (b"[" * 100_000, "bad_json"),
    "a number of 10,000 digits": (b'{"a": ' + b"9" * 10_000 + b"}", "bad_json"),
    "a bit flipped in a quote": (flipped(json.dumps(asked()).encode(), 1), "bad_json"),
    "a list": (b"[1, 2]", "bad_row"),
    "a string": (b'"messages"', "bad_row"),
    "null": (b"null", "bad_row"),
    "no messages": ({"conversations": []}, "bad_row"),
    "messages is text": ({"messages": "Hi"}, "bad_row"),
    "turns are texts": ({"messages": ["Hi", "Hello"]}, "bad_row"),
    "images is a number": ({**asked(), "images": 7}, "bad_row"),
    "an image is a number": ({**asked(), "images": [7]}, "bad_row"),
    "an image is an empty object": ({**asked(), "images": [{}]}, "bad_row"),
    "rejected is a number": ({**asked("Hi"), "rejected_messages": 5}, "bad_row"),
    "no turns": ({"messages": []}, "bad_role"),
    "an unknown role": ({"messages": turns(("human", "Hi"), ("gpt", "Ho"))}, "bad_role"),
    "role is a list": ({"messages": turns((["user"], "Hi"), ("assistant", "Ho"))}, "bad_role"),
    "role is missing": ({"messages": [{"content": "Hi"}]}, "bad_role"),
    "no answer": ({"messages": turns(("user", "Hi"))}, "bad_role"),
    "two questions": ({"messages": turns(("user", "a"), ("user", "b"), ("assistant", "c"))},
                      "bad_role"),
    "system in the middle": ({"messages": turns(("user", "a"), ("system", "b"))}, "bad_role"),
    "content is a number": (asked(5), "bad_content"),
    "content is null": (asked(None), "bad_content"),
    "half a surrogate": (asked("\ud800"), "bad_content"),
    "a NUL": (asked("a\0b"), "bad_content"),
    "a part without a type": (asked([{"text": "Hi"}]), "bad_content"),
    "a part of a kind unheard of": (asked([{"type": "smell"}]), "bad_content"),
    "a text part without text": (asked([{"type": "text"}]), "bad_content"),
    "an empty answer": (asked(answer="", **OWN), "empty_answer"),
    "an answer of blanks": (asked(answer=" \n\u3000", **OWN), "empty_answer"),
    "an empty rejected answer": (asked("Hi", rejected_response=" "), "empty_answer"),
    "a tag too many": (asked("<image><image>?", **OWN), "tag_mismatch"),
    "an image too many": (asked("?", **OWN), "tag_mismatch"),
    "a tag in the answer": (asked("<image>", "<image>", **OWN), "tag_mismatch"),
    "a video tag without a video": (asked("<video>?"), "tag_mismatch"),
    "a huge text": (asked("a" * 2_000_000), "too_long"),
    "up and out": (asked(images=["../a.png"]), "unsafe_path"),
    "down, up and out": (asked(images=["x/../../a.png"]), "unsafe_path"),
    "another place": (asked(images=["/etc/hostname"]), "unsafe_path"),
    "no name": (asked(images=[""]), "unsafe_path"),
    "a NUL in the name": (asked(images=["a\0.png"]), "unsafe_path"),
    "a link out": (asked(images=["link_out.png"]), "unsafe_path"),
    "through a linked folder": (asked(images=["folder_out/secret.png"]), "unsafe_path"),
    "missing": (asked(images=["gone.png"]), "missing_image"),
    "a folder": (asked(images=["folder"]), "missing_image"),
    "a pipe": (asked(images=["pipe.png"]), "missing_image"),
    "a link in a circle": (asked(images=["circle.png"]), "missing_image"),
    "a name far too long": (asked(images=["x" * 5000]), "missing_image"),
    "a surrogate in the name": (asked(images=["\ud800.png"]), "missing_image"),
    "base64 cut": (asked(images=["data:image/png;base64,iVBORw0KGgoA"]), "corrupt_image"),
    "base64 of another alphabet": (asked(images=["data:image/png;base64,!!!!"]), "bad_base64"),
    "base64 of half a byte": (asked(images=["data:image/png;base64,iVBOR"]), "bad_base64"),
    "a data URI without a comma": (asked(images=["data:image/png"]), "bad_base64"),
    "a server that is not there": (asked(images=["http://127.0.0.1:9/a.png"]), "fetch_failed"),
    "a URL without a host": (asked(images=["http:///a.png"]), "fetch_failed"),
    "a video that is missing": (asked("<video>?", videos=["gone.mp4"]), "missing_media"),
    "a video that is a picture": (asked("<video>?", videos=["a.png"]), "corrupt_video"),
    "a video cut short": (asked("<video>?", videos=["cut.mp4"]), "corrupt_video"),
    "a sound that is a picture": (asked("<audio>?", audios=["a.png"]), "corrupt_audio"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.media.FETCH_TRIES", 1)
    raw = tmp_path / "raw"
    (raw / "folder").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.png").write_bytes(PNG)
    (raw / "a.png").write_bytes(PNG)
    (raw / "link_out.png").symlink_to(tmp_path / "outside" / "secret.png")
    (raw / "folder_out").symlink_to(tmp_path / "outside")
    (raw / "circle.png").symlink_to(raw / "circle.png")
    os.mkfifo(raw / "pipe.png")
    return raw


def outcome_of(raw, line):
    table = raw / "train.jsonl"
    table.write_bytes(line if isinstance(line, bytes) else json.dumps(line).encode())
    (rows,) = row_ranges(table, key_prefix="train", max_rows=10)
    ((_, outcome),) = read_samples(rows, RowReader(raw, RowFormat("messages")))
    return outcome


@pytest.mark.parametrize("case", LINES)
def test_a_bad_line_is_counted_under_its_cause(case, folder, make_video):
    line, cause = LINES[case]
    (folder / "cut.mp4").write_bytes(make_video()[:-100])
    outcome = outcome_of(folder, line)
    assert isinstance(outcome, BadRowError)
    assert (outcome.cause, outcome.cause in CAUSES) == (cause, True)
    assert len(str(outcome.detail)) < 500


@pytest.mark.parametrize("case", IMAGES)
def test_a_bad_image_is_counted_under_its_cause(case, folder):
    data, cause = IMAGES[case]
    (folder / "a.png").write_bytes(data)
    outcome = outcome_of(folder, asked(**OWN))
    assert isinstance(outcome, BadRowError)
    assert outcome.cause == cause


GOOD = {
    "png": PNG, "jpeg": JPEG, "progressive jpeg": PROGRESSIVE, "webp": WEBP, "gif": GIF,
    "bmp": BMP, "tiff": TIFF,
    "jpeg with something behind its end": JPEG + b"\0" * 12,
    "grey jpeg": encoded("JPEG", quality=30),
    "png with a text chunk": PNG[:33] + chunk(b"tEXt", b"Title\0cat") + PNG[33:],
}  # fmt: skip


@pytest.mark.parametrize("case", GOOD)
def test_a_good_image_is_kept_byte_for_byte(case, folder):
    (folder / "a.png").write_bytes(GOOD[case])
    outcome = outcome_of(folder, asked(**OWN))
    assert isinstance(outcome, RawSample)
    assert outcome.images[0].data == GOOD[case]


def test_a_link_that_stays_inside_is_followed(folder):
    (folder / "link.png").symlink_to("a.png")
    outcome = outcome_of(folder, asked(images=["link.png"]))
    assert isinstance(outcome, RawSample)


def test_base64_of_a_jpeg_is_not_taken_for_a_path(folder):
    outcome = outcome_of(folder, asked(images=[base64.b64encode(JPEG).decode()]))
    assert isinstance(outcome, RawSample)
    assert outcome.images[0].data == JPEG


def test_every_jpeg_that_the_walk_accepts_decodes():
    """No bit of the headers may be flipped into something that is accepted but does not open."""
    accepted = 0
    for at in range(2, JPEG.index(b"\xff\xda") + 14):
        for bit in range(8):
            data = bytearray(JPEG)
            data[at] ^= 1 << bit
            if walk_jpeg(bytes(data)) is None:
                continue
            accepted += 1
            try:
                Image.open(io.BytesIO(data)).load()
            except (OSError, SyntaxError, ValueError) as error:
                pytest.fail(f"bit {bit} of byte {at}: {error}")
    assert accepted > 1000  # quantisation: other pictures, but pictures


@pytest.mark.parametrize("case", ["grey", "4:4:4", "4:2:2", "restarts", "cmyk", "optimised"])
def test_jpegs_of_all_kinds_are_accepted(case):
    mode = {"grey": "L", "cmyk": "CMYK"}.get(case, "RGB")
    options = {
        "4:4:4": {"subsampling": 0}, "4:2:2": {"subsampling": 1},
        "restarts": {"restart_marker_rows": 1}, "optimised": {"optimize": True},
    }.get(case, {})  # fmt: skip
    out = io.BytesIO()
    gradient(64, 48).convert(mode).save(out, "JPEG", **options)
    assert check_image(out.getvalue()) == "jpg"
    assert (walk_jpeg(out.getvalue()) == (64, 48)) is (case != "cmyk")
