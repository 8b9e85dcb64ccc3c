"""An image file read once: the bytes that were checked are the bytes that are kept."""

import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from data_prep.conversation import BadRowError
from data_prep.files import is_inside

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
# What PIL's decoders raise on damaged bytes.
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError,
    struct.error, zlib.error,
)  # fmt: skip


@dataclass(frozen=True)
class EncodedImage:
    """An image that decodes, as the bytes of its file."""

    path: Path
    extension: str
    data: bytes


def read_image(root: Path, name: str) -> EncodedImage:
    """Read and check the image `name` of the dataset in `root`.

    Raises:
        BadRowError: `unsafe_path`, `missing_image`, `absurd_size` or `corrupt_image`.
    """
    if not is_inside(name):
        raise BadRowError("unsafe_path", f"{name} leads out of the dataset")
    try:
        data = (root / name).read_bytes()
    except OSError as error:
        raise BadRowError("missing_image", f"{name}: {error.strerror}") from error
    try:
        return EncodedImage(path=root / name, extension=_decode(data), data=data)
    except BadRowError as error:
        raise BadRowError(error.cause, f"{name}: {error.detail}") from error


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
        raise BadRowError("absurd_size", str(error)) from error
    except UnidentifiedImageError as error:  # its text holds an address: it differs between runs
        raise BadRowError("corrupt_image", f"none of {', '.join(FORMATS)}") from error
    except DECODE_ERRORS as error:
        raise BadRowError("corrupt_image", f"{type(error).__name__}: {error}") from error
    return extension


def _check_size(width: int, height: int) -> None:
    shorter, longer = sorted((width, height))
    if longer > MAX_ASPECT_RATIO * shorter:
        raise BadRowError("absurd_size", f"{width} x {height} pixels")
