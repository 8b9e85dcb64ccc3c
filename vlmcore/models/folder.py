"""A model folder in either of its two forms, for whoever puts it onto ranks.

A Megatron model folder holds `checkpoint/` (torch_dist) and `hf/` (config, tokenizer, processor);
an HF model folder holds safetensors beside those files. Training starts from either and writes the
form that it started from.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule

from vlmcore.models.build import load_weights, save_weights
from vlmcore.models.direct import load_hf_weights, save_hf_weights
from vlmcore.weights.convert import CHECKPOINT
from vlmcore.weights.sidecar import SIDECAR, config_dir, copy_sidecar


def load_folder(chunks: Sequence[MegatronModule], model_dir: Path) -> None:
    """Fills this rank's chunks, at any layout.

    Raises:
        WeightError: The folder and the model do not fit.
    """
    if _is_megatron(model_dir):
        load_weights(chunks, model_dir / CHECKPOINT)
    else:
        load_hf_weights(chunks, model_dir)


def save_folder(chunks: Sequence[MegatronModule], target: Path, *, like: Path) -> None:
    """Writes the model that all ranks hold together, in the form of the folder it came from.

    Raises:
        WeightError: No rank holds some element of the model.
    """
    megatron = _is_megatron(like)
    if megatron:
        save_weights(chunks, target / CHECKPOINT)
    else:
        save_hf_weights(chunks, like, target)
    if dist.get_rank() == 0:
        copy_sidecar(config_dir(like), target / SIDECAR if megatron else target)
    dist.barrier()


def _is_megatron(model_dir: Path) -> bool:
    return (model_dir / CHECKPOINT).is_dir()
