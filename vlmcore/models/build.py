"""From an HF config to a Megatron model on this rank, and its weights from a torch_dist folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.transformer.module import MegatronModule

from vlmcore.errors import WeightError
from vlmcore.families import family_of, read_config
from vlmcore.layout import Layout
from vlmcore.models.fit import require_layout
from vlmcore.models.language_model import build_language_model, transformer_config
from vlmcore.models.vision import build_vision_model, placeholders
from vlmcore.models.vision_language import VisionLanguageModel

ONE_RANK = Layout()


def build_model(
    hf_dir: Path,
    *,
    layout: Layout = ONE_RANK,
    params_dtype: torch.dtype = torch.float32,
    parallel_output: bool = True,
    **training: Any,
) -> list[MegatronModule]:
    """This rank's chunks of the model that an HF folder describes; weights are not initialised.

    There is one chunk, unless pipeline stages are interleaved (virtual pipeline).

    Args:
        hf_dir: Folder with config.json and, for a vision-language model, the tokenizer.
        layout: As given to `vlmcore.training.distributed.model_parallel`.
        params_dtype: Dtype of the weights.
        parallel_output: Leave logits split over the tensor parallel ranks.
        training: Further fields of Megatron's TransformerConfig, see `transformer_config`.

    Raises:
        TrainError: The layout does not divide the model.
        WeightError: Unknown family, or the tokenizer lacks a placeholder.
    """
    require_layout(hf_dir, layout)
    config = read_config(hf_dir)
    family = family_of(config)
    shape = family.language_model(config)
    mcore_config = transformer_config(shape, layout, params_dtype=params_dtype, **training)
    count = layout.virtual_pipeline_model_parallel_size
    chunks: list[MegatronModule] = [
        build_language_model(
            shape,
            mcore_config,
            virtual_stage=stage,
            parallel_output=parallel_output,
            scatter_embedding=family.vision is None,
        )
        for stage in (range(count) if count > 1 else [None])
    ]
    if family.vision is None:
        return chunks
    from transformers import AutoConfig

    whole = AutoConfig.from_pretrained(hf_dir)
    tokens = placeholders(hf_dir, family, whole)
    return [
        VisionLanguageModel(
            mcore_config,
            language_model=chunk,
            vision_model=(
                build_vision_model(whole, family, dtype=params_dtype) if chunk.pre_process else None
            ),
            placeholders=tokens,
        )
        for chunk in chunks
    ]


def sharded_state_dict(model: MegatronModule) -> dict[str, Any]:
    """A chunk's sharded state dict with the metadata that all our checkpoints use."""
    return model.sharded_state_dict(
        metadata={
            "singleton_local_shards": False,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
    )


def load_weights(chunks: Sequence[MegatronModule], checkpoint: Path) -> None:
    """Loads this rank's part of a torch_dist checkpoint, whatever layout wrote it.

    Raises:
        WeightError: The checkpoint lacks a tensor, or holds one that no rank asks for.
    """
    wanted = {f"model{i}": sharded_state_dict(chunk) for i, chunk in enumerate(chunks)}
    try:
        loaded = dist_checkpointing.load(wanted, str(checkpoint), strict=StrictHandling.RAISE_ALL)
    except dist_checkpointing.core.CheckpointingException as error:
        raise WeightError(f"{checkpoint}: {error}") from error
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{i}"], strict=True)


def save_weights(chunks: Sequence[MegatronModule], folder: Path) -> None:
    """Saves the weights that all ranks hold together as torch_dist into a new folder."""
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    state = {f"model{i}": sharded_state_dict(chunk) for i, chunk in enumerate(chunks)}
    dist_checkpointing.save(state, str(folder))
