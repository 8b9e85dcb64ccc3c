"""The transformers engine's model: loaded, frozen, adapted; and its way back to a model folder."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmcore import megatron_cpu
from vlmcore.errors import TrainError
from vlmcore.families import Family, family_of, read_config
from vlmcore.models.vision import placeholders, unreached_weights
from vlmcore.recipe.train_stage import TrainStage
from vlmcore.training.freeze_groups import (
    GROUPS,
    adapter_config,
    frozen_groups,
    hollow_model,
    require_match,
    require_trainable,
)
from vlmcore.training.job import ADAPTER, TrainJob
from vlmcore.training.own_weights import OwnWeights, build_hollow, zeros_lent
from vlmcore.training.packed_model import PackedModel
from vlmcore.weights.adapter_plan import plan_adapters
from vlmcore.weights.adapters import FreshAdapter, write_peft
from vlmcore.weights.architecture import check_against_architecture
from vlmcore.weights.sidecar import copy_sidecar

if TYPE_CHECKING:
    from peft import LoraConfig

MODEL = "model."  # before a transformers name in PackedModel
_MAX_SHARD_SIZE = "4GB"


def build(
    stage: TrainStage, hf_dir: Path, *, idle_inputs: Mapping[str, Tensor]
) -> tuple[PackedModel, OwnWeights | None]:
    """The stage's model on this rank's device, with what it trains marked.

    Where ranks share weights out, those of the folder have no memory yet; what fills them comes
    with it.

    Raises:
        TrainError: Nothing is trainable, or the tuner cannot run here or on this model.
        WeightError: The folder and its architecture do not fit.
    """
    family = family_of(read_config(hf_dir))
    adapters = _refuse_before_loading(stage, hf_dir, family)
    own = None
    if stage.fsdp is not None or stage.shares_weights_by_deepspeed:
        own = OwnWeights(hf_dir, getattr(torch, stage.torch_dtype))
        model = build_hollow(stage, hf_dir, family)
    else:
        model = load(stage, hf_dir, family, quantized=stage.tuner_type == "qlora")
    if adapters is None:
        apply_freezes(model, family, stage)
    else:
        _adapt(model, adapters, stage, hf_dir, family, own)
    seeing = family.vision is not None
    packed = PackedModel(
        model,
        mrope=family.vision is not None and family.vision.mrope,
        placeholders=placeholders(hf_dir, family, model.config) if seeing else None,
        dtype=getattr(torch, stage.torch_dtype),
        max_tokens=stage.max_length * stage.micro_batch_size,
        gathers=stage.shares_weights_by_deepspeed,
    )
    if stage.tuner_type != "qlora":  # quantized weights were put there as they were loaded
        place = megatron_cpu.device()
        packed._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(place))
    _keep_reached(packed, idle_inputs, always=stage.shares_weights_by_deepspeed)
    _recompute(packed, stage)
    packed.train()
    return packed, own


def load(stage: TrainStage, hf_dir: Path, family: Family, *, quantized: bool = False) -> Any:
    """A folder's model by transformers, in the stage's dtype."""
    import transformers

    options: dict[str, Any] = {}
    if quantized:
        groups = family.groups
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, stage.torch_dtype),
            llm_int8_skip_modules=[
                "lm_head",
                *(p.rstrip(".") for g in ("vit", "aligner") for p in groups.get(g, ())),
            ],
        )
        options["device_map"] = {"": megatron_cpu.device()}
    architecture = getattr(transformers, family.architecture)
    return architecture.from_pretrained(
        hf_dir, dtype=getattr(torch, stage.torch_dtype), attn_implementation="sdpa", **options
    )


def require_bitsandbytes(stage: TrainStage) -> None:
    """Refuses qlora where its kernels cannot run.

    Raises:
        TrainError: No CUDA device, or no bitsandbytes.
    """
    import importlib.util

    lacks = []
    if not torch.cuda.is_available():
        lacks.append("a CUDA device")
    if importlib.util.find_spec("bitsandbytes") is None:
        lacks.append("the package bitsandbytes")
    if lacks:
        raise TrainError(
            f"train.{stage.name}: tuner_type qlora needs {' and '.join(lacks)}, which this machine "
            f"lacks; use lora"
        )


def trainable_table(model: nn.Module, family: Family) -> dict[str, dict[str, int]]:
    """{group: {parameters, trainable}}."""
    table = {group: {"parameters": 0, "trainable": 0} for group in GROUPS}
    for name, weight in model.named_parameters():
        row = table[family.group_of(name)]
        row["parameters"] += weight.numel()
        row["trainable"] += weight.numel() * weight.requires_grad
    return {group: row for group, row in table.items() if row["parameters"]}


def trained_names(packed: PackedModel) -> Iterator[tuple[str, nn.Parameter]]:
    """What trains, by its name in the transformers model."""
    for name, weight in packed.named_parameters():
        if weight.requires_grad:
            yield name.removeprefix(MODEL), weight


def write_folder(job: TrainJob, trained: Mapping[str, Tensor]) -> None:
    """Writes the HF model folder that was trained, and its adapter's; on one rank.

    Adapters are merged in fp32 and rounded once.

    Args:
        job: Where it started from, and where to write.
        trained: Whole tensors of all that trained, by name in the transformers model.
    """
    family = family_of(read_config(job.hf_dir))
    stage, tuned = job.stage, None
    model = load(stage, job.hf_dir, family)
    if stage.tuner_type != "full":
        tuned = _with_adapters(model, _adapters(stage, job.hf_dir))
    result = model.load_state_dict(trained, strict=False)
    assert not result.unexpected_keys, result.unexpected_keys
    if tuned is not None:
        tuned.save_pretrained(job.output_dir / ADAPTER)
        (job.output_dir / ADAPTER / "README.md").unlink(missing_ok=True)
        model = tuned.merge_and_unload()
    model.save_pretrained(job.output_dir, max_shard_size=_MAX_SHARD_SIZE)
    copy_sidecar(job.hf_dir, job.output_dir)


def apply_freezes(model: nn.Module, family: Family, stage: TrainStage) -> None:
    """Sets `requires_grad` by group and `trainable_parameters_regex`."""
    frozen, pattern = frozen_groups(stage), stage.trainable_parameters_regex
    for name, weight in model.named_parameters():
        picked = bool(pattern) and re.search(pattern, name) is not None
        weight.requires_grad_(picked or not frozen[family.group_of(name)])


def _refuse_before_loading(stage: TrainStage, hf_dir: Path, family: Family) -> LoraConfig | None:
    """Refuses what cannot train; gives the adapters that the stage asks for, if any."""
    check_against_architecture(hf_dir)
    if stage.tuner_type == "full":
        hollow = hollow_model(hf_dir, family)
        apply_freezes(hollow, family, stage)
        if stage.trainable_parameters_regex:
            require_match([name for name, _ in hollow.named_parameters()], stage)
        require_trainable(trainable_table(hollow, family), stage)
        return None
    if stage.tuner_type == "qlora":
        require_bitsandbytes(stage)
    return _adapters(stage, hf_dir)


def _adapters(stage: TrainStage, hf_dir: Path) -> LoraConfig:
    config = adapter_config(stage, hf_dir)
    config.use_dora = stage.tuner_type == "dora"
    return config


def _adapt(
    model: Any,
    adapters: LoraConfig,
    stage: TrainStage,
    hf_dir: Path,
    family: Family,
    own: OwnWeights | None,
) -> None:
    """Puts untrained adapters onto a model; beside them only what `lora_llm` trains."""
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    tuned = _with_adapters(model, adapters)
    plan = plan_adapters(hf_dir, adapter_config(stage, hf_dir))
    with tempfile.TemporaryDirectory() as folder:
        write_peft(FreshAdapter(plan, seed=stage.seed), Path(folder) / ADAPTER)
        untrained = load_peft_weights(str(Path(folder) / ADAPTER))
    if own is None:
        result: Any = set_peft_model_state_dict(tuned, untrained)
        assert not result.unexpected_keys, result.unexpected_keys
    else:
        own.adapters = untrained
    frozen = frozen_groups(stage)
    for name, weight in model.named_parameters():
        group = family.group_of(name)
        beside = stage.tuner_type == "lora_llm" and group != "llm" and not frozen[group]
        weight.requires_grad_("lora_" in name or beside)


def _with_adapters(model: Any, adapters: LoraConfig) -> Any:
    """peft's model around it, whose adapters stand inside the very modules."""
    from peft import get_peft_model

    model.name_or_path = ""  # peft would record where the base lies on this machine
    return get_peft_model(model, adapters)


def _keep_reached(packed: PackedModel, idle_inputs: Mapping[str, Tensor], *, always: bool) -> None:
    """Has every trained weight of a vision side get a gradient from every row, on every rank."""
    if packed.placeholders is None or not idle_inputs:
        return
    vision = packed.vision
    weights = [
        weight
        for name, weight in vision.named_parameters()
        if not name.startswith("language_model.")
    ]
    side = {weight for weight in weights if weight.requires_grad}
    if not (side or always):
        return
    place = megatron_cpu.device()
    packed.idle_inputs = {name: value.to(place) for name, value in idle_inputs.items()}
    if side:
        with zeros_lent(weights):
            lost = unreached_weights(
                vision, packed.idle_inputs, packed.placeholders, dtype=packed.dtype
            )
        for weight in side.intersection(lost):
            weight.requires_grad_(False)  # else weight decay alone would move it


def _recompute(packed: PackedModel, stage: TrainStage) -> None:
    """Has backward compute layers again rather than keep what they made."""
    if stage.recompute_granularity == "full":
        packed.decoder.gradient_checkpointing_enable({"use_reentrant": packed.reentrant})
    if stage.vit_gradient_checkpointing and packed.placeholders is not None:
        for name, module in packed.vision.named_children():
            if name != "language_model" and hasattr(module, "gradient_checkpointing_enable"):
                module.gradient_checkpointing_enable({"use_reentrant": False})
