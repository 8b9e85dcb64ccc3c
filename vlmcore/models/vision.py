"""The vision side of a model: the transformers modules themselves, without their decoder.

What stands under HF's `model.` beside the language model (tower, projector, learned line breaks) is
one transformers object; its own `get_image_features` and `get_video_features` turn a processor's
output into features, each family in its own way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmcore import megatron_cpu
from vlmcore.errors import WeightError
from vlmcore.families import Family
from vlmcore.models.gated import gate_by_hand
from vlmcore.models.norm import norm_by_hand
from vlmcore.models.patch_projection import project_by_product
from vlmcore.models.rotary import turn_by_hand
from vlmcore.models.vision_attention import attend_by_length

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Placeholders:
    """Token ids that stand for image and video features, by their names in the tokenizer."""

    image: int
    video: int | None


def placeholders(hf_dir: Path, family: Family, config: PreTrainedConfig) -> Placeholders:
    """The placeholders of a vision-language model.

    Args:
        hf_dir: Folder of the tokenizer.
        family: Says what the tokens are called.
        config: The folder's config, as transformers reads it.

    Raises:
        WeightError: The tokenizer lacks a token, or the config names another id for it.
    """
    from transformers import AutoTokenizer

    assert family.vision is not None
    vocabulary = AutoTokenizer.from_pretrained(hf_dir, config=config).get_vocab()
    faults = []
    for field, name in family.vision.tokens.items():
        found, configured = vocabulary.get(name), getattr(config, field, None)
        if found is None:
            faults.append(
                f"the tokenizer has no token {name}; take the tokenizer of a vision-language "
                f"donor, or add the token"
            )
        elif configured != found:
            faults.append(
                f"the tokenizer gives {name} id {found}, config.json says {field} {configured}; "
                f"set config.json to {found}"
            )
    if faults:
        raise WeightError(f"{hf_dir}: " + "; ".join(faults))
    video = family.vision.video_token
    return Placeholders(
        image=vocabulary[family.vision.image_token],
        video=None if video is None else vocabulary[video],
    )


def build_vision_model(
    config: PreTrainedConfig, family: Family, *, dtype: torch.dtype
) -> nn.Module:
    """The vision side with uninitialised weights; what no checkpoint holds is computed.

    Args:
        config: Of the whole model, as transformers reads it.
        family: Names the class.
        dtype: Of the weights.
    """
    import transformers

    with torch.device("meta"):
        whole = getattr(transformers, family.architecture)._from_config(config, dtype=dtype)
    vision: Any = whole.model
    del vision.language_model
    vision.to_empty(device=megatron_cpu.device())
    for tensor in vision.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True  # loaded later: transformers initialises the rest
    for module in vision.modules():
        module._is_hf_initialized = False
    vision.initialize_weights()
    attend_by_length(vision)
    project_by_product(vision)
    gate_by_hand(vision)
    norm_by_hand(vision)
    turn_by_hand(vision)
    built: nn.Module = vision
    return built


@dataclass(frozen=True)
class Features:
    """Features of one kind of placeholder, [F, H], and those that later layers get, each [F, H]."""

    token_id: int
    embedded: Tensor
    deepstack: tuple[Tensor, ...]


def see(
    vision_model: Any, inputs: Mapping[str, Any], tokens: Placeholders, *, dtype: torch.dtype
) -> list[Features]:
    """Features of the images and videos that a processor returned.

    Args:
        vision_model: From `build_vision_model`.
        inputs: The processor's arrays that are no text: `pixel_values` and what goes with it,
            `pixel_values_videos` and what goes with it.
        tokens: Where the features belong.
        dtype: Of the model's weights.
    """
    found = []
    for token_id, pixels, method, is_video in (
        (tokens.image, "pixel_values", "get_image_features", False),
        (tokens.video, "pixel_values_videos", "get_video_features", True),
    ):
        if inputs.get(pixels) is None:
            continue
        assert token_id is not None
        arguments = {k: v for k, v in inputs.items() if ("video" in k) == is_video}
        arguments[pixels] = arguments[pixels].to(dtype)
        output = getattr(vision_model, method)(**arguments, return_dict=True)
        levels = getattr(output, "deepstack_features", None) or ()
        found.append(
            Features(token_id, _flat(output.pooler_output), tuple(_flat(x) for x in levels))
        )
    return found


def marked(input_ids: Tensor, seen: Features) -> Tensor:
    """Where the features belong, in the shape of `input_ids`.

    Raises:
        ValueError: The placeholders do not match the features.
    """
    where = input_ids == seen.token_id
    count = int(where.sum())
    if count != len(seen.embedded):
        raise ValueError(
            f"{count} placeholders (token {seen.token_id}), but {len(seen.embedded)} image "
            f"features; the processor that expanded them does not belong to this model"
        )
    return where


def reach(found: Sequence[Features]) -> Tensor:
    """A zero whose gradient reaches every weight that the features depend on.

    One row of each does, and its mean cannot overflow, which times 0 would be no number.
    """
    rows = [level[0] for seen in found for level in (seen.embedded, *seen.deepstack)]
    return 0 * torch.stack([row.float().mean() for row in rows]).sum()


def unreached_weights(
    vision_model: nn.Module, inputs: Mapping[str, Any], tokens: Placeholders, *, dtype: torch.dtype
) -> list[nn.Parameter]:
    """Weights asking for a gradient that no feature depends on, so that none would ever come.

    LLaVA takes the states of an inner layer of its tower: what stands above it is loaded and saved,
    but has no part in the model. Arguments as for `see`.
    """
    asking = [weight for weight in vision_model.parameters() if weight.requires_grad]
    features = see(vision_model, inputs, tokens, dtype=dtype)
    total = torch.stack([x.float().mean() for f in features for x in (f.embedded, *f.deepstack)])
    found = torch.autograd.grad(total.sum(), asking, allow_unused=True)
    return [weight for weight, grad in zip(asking, found, strict=True) if grad is None]


def _flat(features: Tensor | Sequence[Tensor]) -> Tensor:
    """[F, H] from a tensor per image, or one tensor of any leading dimensions."""
    if not isinstance(features, Tensor):
        features = torch.cat(list(features))
    return features.reshape(-1, features.shape[-1])
