"""What ms-swift, Megatron, transformers and LLaMA-Factory call a recipe's fields and values.

Only the remedy of an error message reads these tables; the recipe itself has one spelling.
"""

from __future__ import annotations

# Another name for the very same thing; the first field that the section has is meant.
SAME: dict[str, tuple[str, ...]] = {
    # optimizer and schedule
    "lr": ("learning_rate",),
    "max_lr": ("learning_rate",),
    "lr_min": ("min_lr",),
    "min_learning_rate": ("min_lr",),
    "max_steps": ("train_iters",),
    "num_steps": ("train_iters",),
    "train_steps": ("train_iters",),
    "lr_scheduler_type": ("lr_decay_style",),
    "lr_scheduler": ("lr_decay_style",),
    "warmup_ratio": ("lr_warmup_fraction",),
    "lr_warmup_ratio": ("lr_warmup_fraction",),
    "warmup_steps": ("lr_warmup_iters",),
    "lr_warmup_steps": ("lr_warmup_iters",),
    "max_grad_norm": ("clip_grad",),
    "gradient_clipping": ("clip_grad",),
    "adam_epsilon": ("adam_eps",),
    # batches and lengths
    "per_device_train_batch_size": ("micro_batch_size",),
    "train_batch_size": ("global_batch_size",),
    "seq_length": ("max_length",),
    "max_seq_length": ("max_length",),
    "cutoff_len": ("max_length",),
    "model_max_length": ("max_length",),
    "image_max_pixels": ("max_pixels",),
    # what is trained
    "train_type": ("tuner_type",),
    "sft_type": ("tuner_type",),
    "finetuning_type": ("tuner_type",),
    "freeze_vision_model": ("freeze_vit",),
    "freeze_vision_tower": ("freeze_vit",),
    "freeze_language_model": ("freeze_llm",),
    "freeze_projector": ("freeze_aligner",),
    "freeze_multi_modal_projector": ("freeze_aligner",),
    "stage": ("task",),
    "random_seed": ("seed",),
    "dtype": ("torch_dtype",),
    "torch_dtype": ("dtype",),
    # layout and running
    "tp": ("tensor_model_parallel_size",),
    "tp_size": ("tensor_model_parallel_size",),
    "tensor_parallel_size": ("tensor_model_parallel_size",),
    "sp": ("sequence_parallel",),
    "pp": ("pipeline_model_parallel_size",),
    "pp_size": ("pipeline_model_parallel_size",),
    "pipeline_parallel_size": ("pipeline_model_parallel_size",),
    "vpp": ("virtual_pipeline_model_parallel_size",),
    "cp": ("context_parallel_size",),
    "ep": ("expert_model_parallel_size",),
    "expert_parallel_size": ("expert_model_parallel_size",),
    "etp": ("expert_tensor_parallel_size",),
    "lora_r": ("lora_rank",),
    "lora_target": ("target_modules",),
    "lora_target_modules": ("target_modules",),
    "router_aux_loss_coef": ("moe_aux_loss_coeff",),
    "gradient_checkpointing": ("recompute_granularity",),
    "nproc": ("nproc_per_node",),
    "num_gpus": ("nproc_per_node",),
    "gpus_per_node": ("nproc_per_node",),
    "num_nodes": ("nnodes",),
    "num_machines": ("nnodes",),
    "machine_rank": ("node_rank",),
    "save_steps": ("save_interval",),
    "eval_steps": ("eval_interval",),
    "logging_steps": ("log_interval",),
    # data, serving, scoring
    "dataset": ("data",),
    "datasets": ("data",),
    "dataset_num_proc": ("num_workers",),
    "model": ("vlm",),
    "language_model": ("llm",),
    "infer_backend": ("engine",),
    "max_context_len": ("max_model_len",),
    "max_new_tokens": ("max_tokens",),
    "num_samples": ("limit",),
    "eval_batch_size": ("concurrency",),
    "eval": ("evaluate",),
    "evaluation": ("evaluate",),
    "stages": ("train",),
}

_EPOCHS = "optimizer steps, that is epochs × rows / global_batch_size"

# A name for something that the recipe counts otherwise: the field, and what to write into it.
OTHERWISE: dict[str, tuple[str, str]] = {
    "num_train_epochs": ("train_iters", _EPOCHS),
    "max_epochs": ("train_iters", _EPOCHS),
    "num_epochs": ("train_iters", _EPOCHS),
    "epochs": ("train_iters", _EPOCHS),
    "train_samples": ("train_iters", "optimizer steps, that is samples / global_batch_size"),
    "gradient_accumulation_steps": (
        "global_batch_size",
        "micro_batch_size × data parallel size × gradient_accumulation_steps",
    ),
    "split_dataset_ratio": ("split_ratios", "parts of train, val and test: [99, 1, 0] for 0.01"),
    "val_size": ("split_ratios", "parts of train, val and test: [99, 1, 0] for 0.01"),
    "bf16": ("torch_dtype", "bfloat16"),
    "fp16": ("torch_dtype", "float16"),
}

# Values of fields with a fixed choice.
VALUES: dict[str, str] = {
    "bf16": "bfloat16",
    "torch.bfloat16": "bfloat16",
    "half": "float16",
    "fp16": "float16",
    "torch.float16": "float16",
    "fp32": "float32",
    "float": "float32",
    "torch.float32": "float32",
    "pretrain": "pt",
    "swift": "messages",
    "mcore": "megatron",
    "hf": "transformers",
}
