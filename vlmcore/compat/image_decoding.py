"""`torchvision.io.decode_image` by Pillow where torchvision's image extension cannot load.

`transformers serve` decodes the images of a request with it (transformers 5.19,
`image_utils.load_image_as_tensor`), which fails with "Couldn't load the image extension".

Condition and end: those of `torchvision_ops`.
"""

from __future__ import annotations

import io
import os
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vlmcore.compat.import_hook import after_import
from vlmcore.compat.torchvision_ops import needed as needed

if TYPE_CHECKING:
    import torch

PIL_MODES = {"GRAY": "L", "GRAY_ALPHA": "LA", "RGB": "RGB", "RGBA": "RGBA", "RGB_ALPHA": "RGBA"}


def install() -> None:
    """Replace the function as soon as the module that holds it is loaded."""
    after_import("torchvision.io.image", _replace)


def _replace(module: ModuleType) -> None:
    module.decode_image = decode_image  # type: ignore[attr-defined]


def decode_image(
    input: torch.Tensor | str | os.PathLike[str],
    mode: Any = "UNCHANGED",
    apply_exif_orientation: bool = False,
) -> torch.Tensor:
    """The image in a file, or in a uint8 tensor of its encoded bytes, as uint8 [C, H, W].

    Args:
        input: Path or bytes.
        mode: `torchvision.io.ImageReadMode`, or its name.
        apply_exif_orientation: Turn the image the way its EXIF tag says.
    """
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    source = io.BytesIO(input.numpy().tobytes()) if isinstance(input, torch.Tensor) else input
    image: Image.Image = Image.open(source)
    if apply_exif_orientation:
        image = ImageOps.exif_transpose(image)
    pil_mode = PIL_MODES.get(getattr(mode, "name", mode).upper(), image.mode)
    pixels_HWC = np.atleast_3d(np.array(image.convert(pil_mode)))
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1).contiguous()
