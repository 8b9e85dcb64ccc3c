"""An HF model folder in another dtype and other shards: what an export is without Megatron."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from vlmcore.families import family_of, read_config
from vlmcore.weights.architecture import check_against_architecture, published_shapes
from vlmcore.weights.convert import REPORT
from vlmcore.weights.report import total_digest
from vlmcore.weights.safetensors_io import (
    SafetensorsFolder,
    parse_size,
    tensor_bytes,
    write_sharded,
)
from vlmcore.weights.sidecar import copy_sidecar, leave_quantization_out, record_dtype


def recast(source: Path, target: Path, *, dtype: str, max_shard_size: str) -> dict[str, Any]:
    """Copies an HF model folder, tensor by tensor; gives the report, also in `conversion.json`.

    Args:
        source: HF folder; every tensor of its architecture has to be there.
        target: New folder.
        dtype: Torch name of the dtype of all tensors.
        max_shard_size: Data of one safetensors file at most, such as 4GB.

    Raises:
        WeightError: The checkpoint differs from its architecture, or a file is damaged.
    """
    import torch

    check_against_architecture(source)
    tensors = SafetensorsFolder(source)
    kept: torch.dtype = getattr(torch, dtype)
    digests: dict[str, str] = {}

    def read(key: str) -> Tensor:
        tensor = tensors.read(key).to(kept)
        digests[key] = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
        return tensor

    target.mkdir(parents=True)
    # the order of a conversion, so that both give the same bytes; other key forms keep their own
    keys = [key for key in published_shapes(source) if key in tensors]
    order = {key: (tensors[key].shape, kept) for key in dict.fromkeys([*keys, *tensors])}
    write_sharded(target, order, read, max_shard_bytes=parse_size(max_shard_size))
    copy_sidecar(source, target)
    leave_quantization_out(target / "config.json")
    record_dtype(target / "config.json", dtype)
    report = {
        "family": family_of(read_config(source)).model_type,
        "keys_read": len(tensors),
        "keys_written": len(digests),
        "digest": total_digest(digests),
        "tensors": dict(sorted(digests.items())),
    }
    (target / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    return report
