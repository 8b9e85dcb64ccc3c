"""A baseline JPEG walked through without unpacking its pixels (ITU T.81, annex B).

Everything is checked that makes libjpeg give up on a file: segments, tables, what refers to them,
and that markers stand where they should up to the very end. What is wrong inside the pixels
themselves libjpeg only warns of, so a file that passes here opens.
"""

import re
import struct
from functools import lru_cache

START, END = b"\xff\xd8\xff", b"\xff\xd9"
BASELINE = (0xC0, 0xC1)  # progressive and other frames are PIL's to judge
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]")  # in pixels: neither stuffing nor restart
SAMPLINGS = (0x11, 0x12, 0x21, 0x22, 0x14, 0x41, 0x24, 0x42)  # as encoders write them


def walk_jpeg(data: bytes) -> tuple[int, int] | None:
    """Width and height of a baseline JPEG that is whole; None where anything is unusual."""
    if not data.startswith(START) or not data.endswith(END):
        return None
    start, quantisers, huffmans = 2, set[int](), set[int]()
    frame = b""
    while start + 4 <= len(data) and data[start] == 0xFF:
        marker, length = data[start + 1], int.from_bytes(data[start + 2 : start + 4], "big")
        segment = data[start + 4 : start + 2 + length]
        if length < 2 or len(segment) != length - 2:
            return None
        start += 2 + length
        if marker == 0xDB and (found := _quantisers(segment)):
            quantisers |= found
        elif marker == 0xC4 and (found := _huffmans(segment)):
            huffmans |= found
        elif marker in BASELINE and not frame and _is_frame(segment, quantisers):
            frame = segment
        elif marker == 0xDA and frame and _is_scan(segment, frame, huffmans):
            ended = MARKER.search(data, start)
            if ended is None or ended.start() != len(data) - 2:
                return None
            height, width = struct.unpack_from(">HH", frame, 1)
            return width, height
        elif marker not in (0xDD, 0xFE) and not 0xE0 <= marker <= 0xEF:
            return None
    return None


@lru_cache(maxsize=256)  # one encoder's files share their tables
def _quantisers(segment: bytes) -> frozenset[int]:
    """Numbers of the tables of a DQT segment; none where they do not fill it."""
    start, found = 0, set()
    while start < len(segment) and segment[start] & 0xEC == 0:
        found.add(segment[start] & 3)
        start += 1 + 64 * (1 + (segment[start] >> 4))
    return frozenset(found) if start == len(segment) else frozenset()


@lru_cache(maxsize=256)
def _huffmans(segment: bytes) -> frozenset[int]:
    """Class and number of the tables of a DHT segment; none where one is impossible."""
    start, found = 0, set()
    while start + 17 <= len(segment) and segment[start] & 0xEC == 0:
        counts = segment[start + 1 : start + 17]
        symbols = segment[start + 17 : start + 17 + sum(counts)]
        is_dc = segment[start] < 0x10
        if not _fits(counts) or (is_dc and any(symbol > 15 for symbol in symbols)):
            return frozenset()
        found.add(segment[start])
        start += 17 + sum(counts)
    return frozenset(found) if start == len(segment) else frozenset()


def _fits(counts: bytes) -> bool:
    """Whether there are as many codes of each length, none of them all ones."""
    code = 0
    for length, count in enumerate(counts, 1):
        code += count
        if count and code >= 1 << length:
            return False
        code <<= 1
    return sum(counts) <= 256


def _is_frame(segment: bytes, quantisers: set[int]) -> bool:
    parts = segment[6:]
    if segment[:1] != b"\x08" or len(segment) < 6 or len(parts) != 3 * segment[5]:
        return False
    return (
        segment[5] in (1, 3)
        and len(set(parts[::3])) == segment[5]
        and all(sampling in SAMPLINGS for sampling in parts[1::3])
        and all(number in quantisers for number in parts[2::3])
    )


def _is_scan(segment: bytes, frame: bytes, huffmans: set[int]) -> bool:
    """Whether it is the one scan of a baseline frame, with tables that were given."""
    count = frame[5]
    if segment[:1] != bytes([count]) or segment[1 + 2 * count :] != b"\x00\x3f\x00":
        return False
    tables = segment[2 : 1 + 2 * count : 2]
    return segment[1 : 1 + 2 * count : 2] == frame[6::3] and all(
        table >> 4 in huffmans and 0x10 | (table & 15) in huffmans for table in tables
    )
