"""What a stage asks of its model, or of this machine, that the ranks would refuse.

A plan asks, before any stage starts; torch is not imported.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from vlmcore.errors import TrainError
from vlmcore.layout import Layout
from vlmcore.models.fit import check_layout, require_layout
from vlmcore.recipe.train_stage import TrainStage
from vlmcore.training.freeze_groups import (
    adaptable,
    frozen_groups,
    require_match,
    require_peft_kind,
    require_trainable,
    targeted,
)
from vlmcore.training.model_outline import ModelOutline

# any of them: Linux has a driver of NVIDIA's or AMD's, or is a guest of Windows
_DRIVERS = ("proc/driver/nvidia", "dev/nvidiactl", "dev/kfd", "dev/dxg")
_OF_VISION = ("vit_lr", "aligner_lr", "vit_gradient_checkpointing")
_LIMITS = ("max_pixels", "min_pixels", "video_max_pixels")


def fit_faults(stage: TrainStage, model: ModelOutline) -> list[str]:
    """What the stage asks for that this model does not have, or that does not divide it."""
    where = f"train.{stage.name}: "
    faults = [where + text for text in layout_faults(stage.layout, model, training=True)]
    faults += [where + text for text in (*_text_faults(stage, model),
                                         *_vision_faults(stage, model))]  # fmt: skip
    if stage.tuner_type == "full":
        return faults + _told(lambda: _require_trained(stage, model))
    return faults + _told(lambda: _require_adapters(stage, model))


def layout_faults(layout: Layout, model: ModelOutline, *, training: bool = False) -> list[str]:
    """What a layout cannot cut in a model; see `require_layout`."""

    def check() -> None:
        check_layout(model.decoder, layout, num_deepstack=model.num_deepstack)
        require_layout(model.decoder_dir, layout, training=training)

    return _told(check)


def machine_faults(stage: TrainStage, root: Path = Path("/")) -> list[str]:
    """What the stage needs that this machine lacks; none where other machines train it too.

    Args:
        stage: One that is to run here.
        root: Where the machine's files begin.
    """
    if stage.nnodes > 1:
        return []
    has_gpu = any((root / driver).exists() for driver in _DRIVERS)
    where, faults = f"train.{stage.name}: ", []
    if stage.tuner_type == "qlora":
        lacks = [] if has_gpu else ["a GPU's driver"]
        if importlib.util.find_spec("bitsandbytes") is None:
            lacks.append("the package bitsandbytes")
        if lacks:
            text = f"tuner_type qlora needs {' and '.join(lacks)}, which this machine lacks"
            faults.append(f"{where}{text}; use lora")
    if stage.optimizer_cpu_offload and not has_gpu:
        text = "optimizer_cpu_offload: this machine has no GPU's driver, so nothing would move"
        faults.append(f"{where}{text}; leave it out")
    return faults


def _text_faults(stage: TrainStage, model: ModelOutline) -> Iterator[str]:
    if stage.task == "sft" and not model.has_chat_template:
        yield f"{model.decoder_dir} has no chat template; add chat_template.jinja, or use task pt"


def _vision_faults(stage: TrainStage, model: ModelOutline) -> Iterator[str]:
    """Fields that have no part in a model without a vision side, or in this one's processor."""
    said = [name for name in (*_OF_VISION, *_LIMITS) if getattr(stage, name)]
    vision = model.family.vision
    if vision is None:
        for name in said:
            text = f"has no part in a {model.family.model_type}, which has no vision side"
            yield f"{name} {text}; leave it out"
        return
    for name in said:
        if name in _LIMITS and name not in vision.pixel_limits:
            kept = ", ".join(vision.pixel_limits) or "none"
            text = f"cannot be kept by the processor of a {model.family.model_type}"
            yield f"{name} {text}, which keeps {kept}; leave it out"


def _require_trained(stage: TrainStage, model: ModelOutline) -> None:
    if stage.trainable_parameters_regex:
        names = model.megatron_parameters() if stage.engine == "megatron" else model.dims
        require_match(sorted(names), stage)
        return
    frozen = frozen_groups(stage)
    groups = {model.family.group_of(name) for name in model.dims}
    require_trainable({group: {"trainable": not frozen[group]} for group in groups}, stage)


def _require_adapters(stage: TrainStage, model: ModelOutline) -> None:
    linear, experts = adaptable(
        stage, model.family, linear=model.linear_layers, experts=model.stacked_experts
    )
    chosen = targeted(stage, {*linear, *experts})
    require_peft_kind(stage, chosen & {*experts})
    size, kv_heads = stage.tensor_model_parallel_size, model.decoder.num_query_groups
    prefix = model.family.text_hf_prefix
    inside = [n for n in chosen if n.startswith(prefix) and re.search(r"\.[qkv]_proj$", n)]
    if inside and size > kv_heads:
        raise TrainError(
            f"train.{stage.name}: tensor_model_parallel_size {size} cuts inside the {kv_heads} kv "
            f"heads; use a divisor of {kv_heads} with adapters on q_proj, k_proj or v_proj"
        )


def _told(check: Callable[[], None]) -> list[str]:
    try:
        check()
    except TrainError as error:
        return [str(error)]
    return []
