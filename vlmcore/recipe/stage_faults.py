"""What is wrong with a training stage although each field by itself is right."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmcore.recipe.train_stage import TrainStage

# The path of the field to mend, seen from the section that checks, and a sentence.
Fault = tuple[tuple[str | int, ...], str]


def stage_faults(stage: TrainStage) -> list[Fault]:
    """Every such fault."""
    return [
        *_engine_faults(stage),
        *_freeze_faults(stage),
        *_tuner_faults(stage),
        *_schedule_faults(stage),
        *_layout_faults(stage),
        *_recompute_faults(stage),
        *_precision_faults(stage),
        *_offload_faults(stage),
        *_overlap_faults(stage),
        *_evaluation_faults(stage),
        *_node_faults(stage),
        *_sample_faults(stage),
    ]


# Fields that one engine alone reads.
_MEGATRON = (
    "tensor_model_parallel_size", "sequence_parallel", "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size", "context_parallel_size", "expert_model_parallel_size",
    "expert_tensor_parallel_size", "recompute_method", "recompute_num_layers", "recompute_modules",
    "optimizer_offload_fraction", "overlap_grad_reduce", "overlap_param_gather", "ddp_bucket_size",
    "async_save", "moe_grouped_gemm", "moe_permute_fusion",
)  # fmt: skip
_TRANSFORMERS = ("deepspeed", "fsdp")


def _engine_faults(stage: TrainStage) -> Iterator[Fault]:
    foreign = {"megatron": _TRANSFORMERS, "transformers": _MEGATRON}
    for name in foreign[stage.engine]:
        if _is_said(stage, name):
            yield (name,), f"has no part in engine {stage.engine}; leave it out"
    if stage.engine == "megatron":
        if stage.tuner_type in ("dora", "qlora"):
            yield ("tuner_type",), f"{stage.tuner_type} needs engine transformers; use lora"
        return
    if stage.torch_dtype == "float16":
        yield ("torch_dtype",), "float16 needs engine megatron; use bfloat16"
    if stage.recompute_granularity == "selective":
        yield ("recompute_granularity",), "selective needs engine megatron; use full"
    if stage.optimizer_cpu_offload:
        yield ("optimizer_cpu_offload",), "write deepspeed: zero2_offload with engine transformers"
    if stage.deepspeed is not None and stage.fsdp is not None:
        yield ("fsdp",), "deepspeed shares the model out too; leave one of them out"
    if stage.shares_weights_by_deepspeed:
        yield from _zero3_faults(stage)
    if stage.tuner_type == "qlora" and (stage.deepspeed or stage.fsdp):
        name = "deepspeed" if stage.deepspeed else "fsdp"
        yield (name,), "cannot cut the 4-bit weights of qlora; leave it out, or use lora"


def _zero3_faults(stage: TrainStage) -> Iterator[Fault]:
    """What recomputation under ZeRO-3 would leave without a gradient."""
    if stage.vit_gradient_checkpointing and stage.tuner_type != "full":
        text = "would leave adapters of the tower without gradients under deepspeed zero3"
        yield ("vit_gradient_checkpointing",), f"{text}; leave it out, or use fsdp"
    if stage.recompute_granularity == "full":
        for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
            if _is_said(stage, name):
                text = "gets no gradient from layers that deepspeed zero3 computes again"
                yield (name,), f"{text}; use fsdp, or recompute_granularity none"


def _freeze_faults(stage: TrainStage) -> Iterator[Fault]:
    try:
        re.compile(stage.trainable_parameters_regex)
    except re.error as error:
        yield ("trainable_parameters_regex",), f"no regular expression: {error}; escape or mend it"
    groups = {"freeze_llm": stage.freeze_llm}
    if stage.model == "vlm":
        groups |= {"freeze_vit": stage.freeze_vit, "freeze_aligner": stage.freeze_aligner}
    if all(groups.values()) and not stage.trainable_parameters_regex:
        names = " and ".join(sorted(groups))
        verb = "is" if len(groups) == 1 else "are all"
        yield ("freeze_llm",), f"nothing is trainable: {names} {verb} true; set one to false"
    for name, frozen in (("vit_lr", stage.freeze_vit), ("aligner_lr", stage.freeze_aligner)):
        if getattr(stage, name) is not None and frozen and not stage.trainable_parameters_regex:
            group = name.removesuffix("_lr")
            yield (name,), f"has no part in it: freeze_{group} is true; leave it out"


def _tuner_faults(stage: TrainStage) -> Iterator[Fault]:
    if stage.tuner_type == "full":
        for name in ("target_modules", "lora_rank", "lora_alpha", "use_rslora"):
            if _is_said(stage, name):
                yield (name,), "needs tuner_type lora, or another with adapters; leave it out"
        return
    if stage.trainable_parameters_regex:
        text = "adapters train, not weights; use tuner_type full, or lora_llm for the vision side"
        yield ("trainable_parameters_regex",), text
    if stage.freeze_llm and (stage.tuner_type == "lora_llm" or not stage.target_modules):
        text = "true, but the adapters belong to the language model; set it to false"
        yield ("freeze_llm",), text
    if stage.tuner_type == "lora_llm" and stage.freeze_vit and stage.freeze_aligner:
        text = "lora_llm trains the vision side too, but freeze_vit and freeze_aligner are both "
        yield ("tuner_type",), text + "true; use lora"


def _schedule_faults(stage: TrainStage) -> Iterator[Fault]:
    if stage.min_lr > stage.learning_rate:
        text = f"{stage.min_lr} is above learning_rate {stage.learning_rate}; lower it"
        yield ("min_lr",), text
    if stage.lr_warmup_iters is not None and _is_said(stage, "lr_warmup_fraction"):
        yield ("lr_warmup_iters",), "lr_warmup_fraction says it too; leave one of them out"
    is_wsd = stage.lr_decay_style == "WSD"
    if is_wsd != (stage.lr_wsd_decay_iters is not None):
        text = "empty, but WSD" if is_wsd else "only for lr_decay_style WSD, which"
        yield ("lr_wsd_decay_iters",), f"{text} decays over that many steps at the end"
    elif stage.lr_wsd_decay_iters is not None and stage.lr_wsd_decay_iters > stage.train_iters:
        text = f"{stage.lr_wsd_decay_iters} is more than train_iters {stage.train_iters}; lower it"
        yield ("lr_wsd_decay_iters",), text


def _layout_faults(stage: TrainStage) -> Iterator[Fault]:
    tensor = stage.tensor_model_parallel_size
    layout = stage.layout
    ranks = stage.num_ranks
    dense = stage.model_parallel_size
    what = "nproc_per_node" if stage.nnodes == 1 else "nnodes × nproc_per_node ="
    wanted = f"does not divide {what} {ranks}; use a divisor"
    if dense == tensor and ranks % tensor:
        yield ("tensor_model_parallel_size",), f"{tensor} {wanted}"
    elif ranks % dense:
        product = f"tensor × pipeline × context parallel size = {dense}"
        yield ("nproc_per_node",), f"{ranks} is no multiple of {product}; use a multiple"
    elif ranks % layout.num_ranks:
        product = f"a replica with its experts takes {layout.num_ranks} ranks"
        yield ("nproc_per_node",), f"{ranks}, but {product}; use a multiple"
    elif stage.global_batch_size % (stage.micro_batch_size * stage.data_parallel_size):
        rows = f"{stage.micro_batch_size} × {stage.data_parallel_size}"
        yield (
            ("global_batch_size",),
            f"{stage.global_batch_size} is no multiple of micro_batch_size × data parallel size = "
            f"{rows}; use a multiple",
        )
    else:
        yield from _interleaving_faults(stage)
    if stage.packing and stage.micro_batch_size != 1:
        yield (
            ("micro_batch_size",),
            "packing makes one row of max_length tokens a micro batch: must be 1, found "
            f"{stage.micro_batch_size}; raise max_length instead, or set packing to false",
        )
    if stage.sequence_parallel and tensor == 1:
        yield ("sequence_parallel",), "needs tensor_model_parallel_size > 1; set it to false"


def _interleaving_faults(stage: TrainStage) -> Iterator[Fault]:
    pipeline = stage.pipeline_model_parallel_size
    if stage.virtual_pipeline_model_parallel_size == 1:
        return
    if pipeline == 1:
        text = "above 1 needs pipeline_model_parallel_size above 1; leave it out"
        yield ("virtual_pipeline_model_parallel_size",), text
    elif stage.num_micro_batches % pipeline:
        yield (
            ("global_batch_size",),
            f"makes {stage.num_micro_batches} micro batches a step; interleaved stages take a "
            f"multiple of pipeline_model_parallel_size {pipeline}",
        )


def _recompute_faults(stage: TrainStage) -> Iterator[Fault]:
    for name in ("recompute_method", "recompute_num_layers"):
        if _is_said(stage, name) and stage.recompute_granularity != "full":
            yield (name,), "only for recompute_granularity full; leave it out"
    if _is_said(stage, "recompute_modules") and stage.recompute_granularity != "selective":
        yield ("recompute_modules",), "only for recompute_granularity selective; leave it out"


def _precision_faults(stage: TrainStage) -> Iterator[Fault]:
    if stage.torch_dtype != "float16":
        for name in ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"):
            if _is_said(stage, name):
                yield (name,), "only for torch_dtype float16; leave it out"
    elif stage.min_loss_scale > stage.initial_loss_scale:
        text = f"{stage.min_loss_scale:g} is above initial_loss_scale; lower it"
        yield ("min_loss_scale",), text


def _offload_faults(stage: TrainStage) -> Iterator[Fault]:
    if not stage.optimizer_cpu_offload:
        if _is_said(stage, "optimizer_offload_fraction"):
            yield ("optimizer_offload_fraction",), "only with optimizer_cpu_offload; leave it out"
    elif stage.engine == "megatron" and stage.torch_dtype != "bfloat16":
        text = f"needs torch_dtype bfloat16, found {stage.torch_dtype}: Megatron's hybrid optimizer"
        yield ("optimizer_cpu_offload",), text + " cannot resume another; leave it out"


def _overlap_faults(stage: TrainStage) -> Iterator[Fault]:
    if stage.overlap_grad_reduce:
        return
    for name in ("overlap_param_gather", "ddp_bucket_size"):
        if _is_said(stage, name):
            yield (name,), "needs overlap_grad_reduce; set it to true, or leave this out"


def _evaluation_faults(stage: TrainStage) -> Iterator[Fault]:
    if stage.eval_interval is None:
        for name in ("eval_iters", "eval_split", "load_best_model_at_end"):
            if _is_said(stage, name):
                yield (name,), "needs eval_interval; say how often to evaluate, or leave this out"


def _node_faults(stage: TrainStage) -> Iterator[Fault]:
    if stage.nnodes == 1:
        for name in ("node_rank", "master_addr", "master_port"):
            if _is_said(stage, name):
                yield (name,), "only for nnodes above 1; leave it out"


def _is_said(stage: TrainStage, name: str) -> bool:
    """Whether a field differs from its default; a dumped recipe spells out those that do not."""
    default: object = type(stage).model_fields[name].default
    return bool(getattr(stage, name) != default)


def _sample_faults(stage: TrainStage) -> Iterator[Fault]:
    if _is_said(stage, "max_encoded_bytes") and not stage.cache_encoded_samples:
        yield ("max_encoded_bytes",), "only with cache_encoded_samples; leave it out"
    if stage.task == "pt" and stage.loss_scale != "default":
        yield ("loss_scale",), "pt trains all text; leave it out, or set task to sft"
    if stage.min_pixels and stage.max_pixels and stage.min_pixels > stage.max_pixels:
        text = f"{stage.min_pixels} is above max_pixels {stage.max_pixels}; lower it"
        yield ("min_pixels",), text
