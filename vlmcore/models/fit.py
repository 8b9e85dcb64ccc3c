"""Whether a layout can cut a model: plain arithmetic on configs, so that a plan can ask."""

from __future__ import annotations

from pathlib import Path

from vlmcore.errors import TrainError
from vlmcore.families import LanguageModel, family_of, read_config
from vlmcore.layout import Layout


def require_layout(hf_dir: Path, layout: Layout, *, training: bool = False) -> None:
    """Refuses a layout that does not divide the model, before anything is built.

    Args:
        hf_dir: Folder with the model's config.json.
        layout: How to cut it.
        training: Whether the model is to be trained, which asks for more than a forward pass.

    Raises:
        TrainError: Lists every size that does not divide what it cuts.
    """
    config = read_config(hf_dir)
    levels = (config.get("vision_config") or {}).get("deepstack_visual_indexes") or ()
    model = family_of(config).language_model(config)
    check_layout(model, layout, num_deepstack=len(levels))
    tensor = layout.tensor_model_parallel_size
    if training and model.moe is not None and tensor > 1 and not layout.sequence_parallel:
        raise TrainError(
            f"layout {layout}: experts beside tensor parallel layers train with sequence_parallel "
            f"alone; set it to true"
        )


def check_layout(model: LanguageModel, layout: Layout, *, num_deepstack: int = 0) -> None:
    """Refuses a layout that cannot cut this decoder.

    Args:
        model: The decoder.
        layout: How to cut it.
        num_deepstack: First decoder layers that image features are added to.

    Raises:
        TrainError: Lists every size that does not divide what it cuts.
    """
    tensor = layout.tensor_model_parallel_size
    pipeline = layout.pipeline_model_parallel_size
    chunks = pipeline * layout.virtual_pipeline_model_parallel_size
    kv_heads = model.num_query_groups
    cuts = [
        ("tensor_model_parallel_size", tensor, "num_attention_heads", model.num_attention_heads),
        ("pipeline_model_parallel_size", pipeline, "num_hidden_layers", model.num_layers),
    ]
    if tensor <= kv_heads:  # beyond, Megatron gives each rank a copy of one kv head
        cuts.append(("tensor_model_parallel_size", tensor, "num_key_value_heads", kv_heads))
    if chunks > pipeline:
        name = "pipeline_model_parallel_size · virtual_pipeline_model_parallel_size"
        cuts.append((name, chunks, "num_hidden_layers", model.num_layers))
    if model.moe is None:
        cuts.append(
            ("tensor_model_parallel_size", tensor, "intermediate_size", model.ffn_hidden_size)
        )
    else:
        experts, size = model.moe.num_experts, model.moe.ffn_hidden_size
        cuts += [
            ("expert_model_parallel_size", layout.expert_model_parallel_size,
             "num_experts", experts),
            ("expert_tensor_parallel_size", layout.expert_tensor_parallel_size,
             "moe_intermediate_size", size),
        ]  # fmt: skip
    faults = [
        f"{name} {size} does not divide {what} {value} of the language model; use a divisor of "
        f"{value}"
        for name, size, what, value in cuts
        if value % size
    ]
    if tensor > kv_heads and tensor % kv_heads:
        faults.append(
            f"tensor_model_parallel_size {tensor} is no multiple of num_key_value_heads "
            f"{kv_heads} of the language model; use a divisor or a multiple of {kv_heads}"
        )
    if model.moe is None and (
        layout.expert_model_parallel_size > 1 or layout.expert_tensor_parallel_size > 1
    ):
        faults.append("expert parallel sizes above 1 need a language model with experts")
    if pipeline == 1 and chunks > 1:
        faults.append(
            "virtual_pipeline_model_parallel_size above 1 needs pipeline_model_parallel_size above "
            "1 too"
        )
    if num_deepstack > model.num_layers // chunks:
        faults.append(
            f"image features enter the first {num_deepstack} decoder layers (deepstack), but the "
            f"first of {chunks} pipeline stages holds {model.num_layers // chunks}; use fewer"
        )
    if faults:
        raise TrainError(f"layout {layout}: " + "; ".join(faults))
