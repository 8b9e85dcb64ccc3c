"""Sample answers to look at: the model's, the expected one, and the image that was asked about."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlmcore.report.documents import Prediction

if TYPE_CHECKING:
    from PIL import Image

_BROWSER_KINDS = {"image/png", "image/jpeg", "image/gif", "image/webp"}
_THUMBNAIL_PX = 384
_ORIGINAL_BYTES = 24 * 1024  # a smaller file goes in as it is; 24 of them are 0.8 MB in base64
_SMALL_PX = 160  # below, an image is enlarged, and reads better with hard pixels


@dataclass(frozen=True)
class Picture:
    """An image as a data URI, with the size in px to show it at."""

    uri: str
    width: int
    height: int
    small: bool


@dataclass(frozen=True)
class Sample:
    """One answer of the last checkpoint; `earlier`: what those before it said."""

    prediction: Prediction
    picture: Picture | None
    earlier: Mapping[str, Prediction]


def pick(predictions: Sequence[Prediction], *, count: int) -> list[Prediction]:
    """Wrong answers first, at most a third while there are right ones; spread evenly over each."""
    wrong = [one for one in predictions if not one.correct]
    right = [one for one in predictions if one.correct]
    num_wrong = min(len(wrong), max(count // 3, count - len(right)))
    return _spread(wrong, num_wrong) + _spread(right, min(len(right), count - num_wrong))


def _spread(items: Sequence[Prediction], count: int) -> list[Prediction]:
    return [items[i * len(items) // count] for i in range(count)]


def collect_samples(
    predictions: Sequence[Prediction],
    earlier: Mapping[str, Sequence[Prediction]],
    *,
    image_dir: Path | None,
    count: int,
) -> list[Sample]:
    """Samples of the last checkpoint's predictions with their images.

    Args:
        earlier: Checkpoint → its predictions on the same benchmark.
        image_dir: Folder that the images' paths are relative to.
    """
    by_id = {name: {one.id: one for one in said} for name, said in earlier.items()}
    return [
        Sample(
            prediction=one,
            picture=_picture(image_dir / one.image) if image_dir else None,
            earlier={name: said[one.id] for name, said in by_id.items() if one.id in said},
        )
        for one in pick(predictions, count=count)
    ]


def _picture(path: Path) -> Picture | None:
    """The image at a size for a page; None where there is none that can be read."""
    from PIL import Image

    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            kind, (width, height) = image.get_format_mimetype(), image.size
            if len(data) > _ORIGINAL_BYTES or kind not in _BROWSER_KINDS:
                thumbnail = image.convert("RGB")
                thumbnail.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
                kind, (width, height) = "image/jpeg", thumbnail.size
                data = _jpeg(thumbnail)
    except OSError:  # also what Pillow raises for bytes that are no image
        return None
    uri = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return Picture(uri, width, height, small=max(width, height) < _SMALL_PX)


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
