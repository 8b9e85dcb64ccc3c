"""Images of files, and their size from the header alone."""

from __future__ import annotations

import io
import struct

from PIL import Image, ImageOps

Size = tuple[int, int]  # width, height
_SIDEWAYS = 5  # EXIF orientations from this one on swap width and height
_ORIENTATION = 274  # EXIF tag
_PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_PNG_EXIF = b"eXIf"  # a chunk's name


def open_image(data: bytes) -> Image.Image:
    """An image as it is shown: its camera's orientation applied, as model servers do."""
    image = Image.open(io.BytesIO(data))
    upright = ImageOps.exif_transpose(image) if "exif" in image.info else image
    upright.load()
    return upright if upright.mode == "RGB" else upright.convert("RGB")


def image_size(data: bytes) -> Size:
    """Width and height of an image as it is shown, from its header."""
    if data.startswith(_PNG) and _PNG_EXIF not in data:  # PIL reads and checks all that follows
        width, height = struct.unpack(">II", data[16:24])
        if width and height:
            return width, height
    image = Image.open(io.BytesIO(data))
    width, height = image.size
    if "exif" in image.info and image.getexif().get(_ORIENTATION, 1) >= _SIDEWAYS:
        return height, width
    return width, height
