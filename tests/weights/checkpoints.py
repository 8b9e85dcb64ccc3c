"""torch_dist folders as plain torch tensors, to look at and to spoil."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

Tensors = dict[str, torch.Tensor]


def load(folder: Path) -> Tensors:
    """Every global tensor, read by torch."""
    entries = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=FileSystemReader(folder), no_dist=True)
    return tensors


def edit(folder: Path, change: Callable[[Tensors], None]) -> None:
    """Has torch write the folder again with changed tensors."""
    tensors = load(folder)
    change(tensors)
    shutil.rmtree(folder)
    dcp.save(tensors, storage_writer=FileSystemWriter(folder), no_dist=True)
