"""From an HF config to a Megatron model on this rank, and its weights from a torch_dist folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.transformer.module import MegatronModule

from vlmcore.errors import WeightError
from vlmcore.families import Family, family_of, read_config
from vlmcore.models.language_model import build_language_model, transformer_config


def build_model(
    hf_dir: Path,
    *,
    tensor_model_parallel_size: int = 1,
    sequence_parallel: bool = False,
    params_dtype: torch.dtype = torch.float32,
    parallel_output: bool = True,
) -> MegatronModule:
    """This rank's part of the model that an HF folder describes; weights are not initialised.

    Args:
        hf_dir: Folder with config.json and, for a vision-language model, the tokenizer.
        tensor_model_parallel_size: As given to `parallel_state`.
        sequence_parallel: Split norms over the tensor parallel ranks too.
        params_dtype: Dtype of the weights.
        parallel_output: Leave logits split over the tensor parallel ranks.

    Raises:
        TrainError: The tensor parallel size does not divide the heads.
        WeightError: Unknown family, or the tokenizer lacks the image placeholder.
    """
    config = read_config(hf_dir)
    family = family_of(config)
    shape = family.language_model(config)
    mcore_config = transformer_config(
        shape,
        tensor_model_parallel_size=tensor_model_parallel_size,
        sequence_parallel=sequence_parallel,
        params_dtype=params_dtype,
    )
    language_model = build_language_model(
        shape,
        mcore_config,
        parallel_output=parallel_output,
        scatter_embedding=family.vision is None,
    )
    if family.vision is None:
        return language_model
    from vlmcore.models.vision_language import VisionLanguageModel

    return VisionLanguageModel(
        mcore_config,
        language_model=language_model,
        vision_model=_vision_model(hf_dir, family, dtype=params_dtype),
        image_token_id=image_token_id(hf_dir, family),
    )


def image_token_id(hf_dir: Path, family: Family) -> int:
    """Id of the image placeholder, by its name in the tokenizer.

    Raises:
        WeightError: The tokenizer lacks it, or the config names another id.
    """
    from transformers import AutoTokenizer

    assert family.vision is not None
    name = family.vision.image_token
    found = AutoTokenizer.from_pretrained(hf_dir).get_vocab().get(name)
    configured = read_config(hf_dir).get("image_token_id")
    if found is None:
        raise WeightError(
            f"{hf_dir}: the tokenizer has no token {name}; take the tokenizer of a vision-language "
            f"donor, or add the token"
        )
    if configured != found:
        raise WeightError(
            f"{hf_dir}: the tokenizer gives {name} id {found}, config.json says image_token_id "
            f"{configured}; set config.json to {found}"
        )
    return int(found)


def _vision_model(hf_dir: Path, family: Family, *, dtype: torch.dtype) -> torch.nn.Module:
    import transformers

    assert family.vision is not None
    config = transformers.AutoConfig.from_pretrained(hf_dir)
    with torch.device("meta"):
        whole = getattr(transformers, family.architecture)(config)
    tower: Any = type(whole.get_submodule(family.vision.hf_prefix.removesuffix(".")))
    built: torch.nn.Module = tower._from_config(config.vision_config, dtype=dtype)
    return built


def sharded_state_dict(model: MegatronModule) -> dict[str, Any]:
    """The model's sharded state dict with the metadata that all our checkpoints use."""
    return model.sharded_state_dict(
        metadata={
            "singleton_local_shards": False,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
    )


def load_weights(model: MegatronModule, checkpoint: Path) -> None:
    """Loads this rank's part of a torch_dist checkpoint, whatever layout wrote it; strict."""
    wanted = {"model": sharded_state_dict(model)}
    try:
        loaded = dist_checkpointing.load(wanted, str(checkpoint))
    except dist_checkpointing.core.CheckpointingException as error:
        raise WeightError(f"{checkpoint}: {error}") from error
    model.load_state_dict(loaded["model"], strict=True)
