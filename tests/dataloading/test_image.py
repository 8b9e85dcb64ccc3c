"""Images as they are shown, and their size without decoding them."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from tests.tiny.rows import noise
from vlmcore.dataloading.image import image_size, open_image


def test_an_image_is_read_as_it_is_shown() -> None:
    stored = noise((40, 20))
    turned = Image.Exif()
    turned[274] = 6  # to be turned by a quarter
    data = {}
    for kind in ("JPEG", "PNG"):
        out = io.BytesIO()
        stored.save(out, kind, exif=turned)
        data[kind] = out.getvalue()
        assert image_size(data[kind]) == open_image(data[kind]).size == (20, 40)
    rotated = stored.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.array(open_image(data["PNG"])), np.array(rotated))
    out = io.BytesIO()
    stored.convert("L").save(out, "PNG")
    assert image_size(out.getvalue()) == (40, 20)
    assert open_image(out.getvalue()).mode == "RGB"


def test_a_png_without_size_or_cut_off_is_no_image() -> None:
    out = io.BytesIO()
    Image.new("RGB", (7, 5)).save(out, "PNG")
    whole = out.getvalue()
    assert image_size(whole) == (7, 5)
    for broken in (whole[:20], whole[:16] + bytes(4) + whole[20:]):
        with pytest.raises((OSError, SyntaxError, ValueError, struct.error)):
            image_size(broken)
