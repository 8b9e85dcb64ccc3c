"""Image bytes checked: the bytes that were checked are the bytes that are kept.

PNG and baseline JPEG are walked through without unpacking pixels: every chunk and checksum of a
PNG, every segment and table of a JPEG up to its end. Whatever looks the least bit odd there, and
every other format (progressive JPEG, WebP, …), is decoded by PIL, which has the last word. A JPEG
holds no checksums: a flipped bit inside its pixels gives other pixels, and is seen by nobody.
"""

import io
import struct
import warnings
import zlib

from PIL import Image, UnidentifiedImageError

from data_prep.causes import BadRowError
from data_prep.jpeg import walk_jpeg

# What is accepted, by its content whatever it is called, and the name it gets in a shard.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
EXTENSIONS = {
    "BMP": "bmp",
    "GIF": "gif",
    "JPEG": "jpg",
    "MPO": "jpg",  # what PIL's JPEG reader calls the files of some phones
    "PNG": "png",
    "TIFF": "tiff",
    "WEBP": "webp",
}
# Qwen-VL's image processors refuse anything longer than this (transformers, `smart_resize`).
MAX_ASPECT_RATIO = 200
MAX_PIXELS = 89_478_485  # above it PIL warns of a decompression bomb: 256 MB of RGB
# What PIL's decoders raise on damaged bytes.
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError,
    struct.error, zlib.error,
)  # fmt: skip

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


def check_image(data: bytes) -> str:
    """The extension of the format that was found.

    Raises:
        BadRowError: `corrupt_image`, `truncated_image`, `absurd_size` or `decompression_bomb`.
    """
    if (size := _walk_png(data)) is not None:
        extension = "png"
    elif (size := walk_jpeg(data)) is not None:
        extension = "jpg"
    else:
        return _decode(data)
    _check_size(*size)
    return extension


def _walk_png(data: bytes) -> tuple[int, int] | None:
    if not data.startswith(PNG_SIGNATURE + b"\0\0\0\rIHDR") or len(data) < 33:
        return None
    width, height, depth, colour, compression, filtering, interlace = struct.unpack_from(
        ">IIBBBBB", data, 16
    )
    if depth not in PNG_DEPTHS.get(colour, ()) or compression or filtering or interlace > 1:
        return None
    view, start, kinds = memoryview(data), 8, set()
    while start + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, start)
        end = start + 12 + length
        if end > len(data):
            return None
        (crc,) = struct.unpack_from(">I", data, end - 4)
        if zlib.crc32(view[start + 4 : end - 4]) != crc:
            return None
        kinds.add(data[start + 4 : start + 8])
        start = end
    whole = start == len(data) and data.endswith(b"IEND\xaeB`\x82") and b"IDAT" in kinds
    if not whole or (colour == 3 and b"PLTE" not in kinds):
        return None
    return width, height


def _decode(data: bytes) -> str:
    """Decode every pixel, and return the extension of the format that was found."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            extension = EXTENSIONS[image.format or ""]
            _check_size(*image.size)
            image.verify()  # checksums, which load() skips; the image cannot be used afterwards
            Image.open(io.BytesIO(data), formats=FORMATS).load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadRowError("decompression_bomb", str(error)) from error
    except UnidentifiedImageError as error:  # its text holds an address: it differs between runs
        raise BadRowError("corrupt_image", f"none of {', '.join(FORMATS)}") from error
    except DECODE_ERRORS as error:
        text = str(error)
        cause = "truncated_image" if "truncated" in text.lower() else "corrupt_image"
        raise BadRowError(cause, f"{type(error).__name__}: {text}") from error
    return extension


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadRowError("decompression_bomb", f"{width} x {height} pixels")
    shorter, longer = sorted((width, height))
    if not shorter:
        raise BadRowError("corrupt_image", f"{width} x {height} pixels")
    if longer > MAX_ASPECT_RATIO * shorter:
        raise BadRowError("absurd_size", f"{width} x {height} pixels")
