"""`import torchvision` where its compiled operators cannot load.

Without them `torchvision::nms` has no schema and the import dies in `_meta_registrations` with
"operator torchvision::nms does not exist". With the schemas defined it succeeds; calling `nms`
still fails, but image processing needs none.

Condition: a CUDA build of torchvision (0.28) beside a CPU build of torch. Ends when torchvision's
build matches torch's, or when torchvision imports without its extension.
"""

from __future__ import annotations

import functools

from vlmcore.compat.builds import cuda_build_beside_cpu_torch
from vlmcore.compat.import_hook import before_import

# signatures: torchvision/csrc/ops/nms.cpp
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def needed() -> bool:
    """Whether torchvision's operators cannot load here."""
    return cuda_build_beside_cpu_torch("torchvision")


def install() -> None:
    """Define the schemas as soon as someone imports torchvision."""
    before_import("torchvision", define_schemas)


@functools.cache  # keeps the library alive: its definitions go with it
def _library() -> object:
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    return library


def define_schemas() -> None:
    """Make torch know the operators' signatures; once."""
    _library()
