"""What a recipe may say of a training stage; the names are ms-swift's and Megatron's."""

from __future__ import annotations

from dataclasses import fields
from typing import Literal

from pydantic import Field, model_validator

from vlmcore.layout import Layout
from vlmcore.recipe.section import (
    CrossFieldError,
    Fraction,
    Operational,
    Section,
    StageName,
)
from vlmcore.recipe.stage_faults import stage_faults


class TrainStage(Section):
    """One training stage; engines read the same fields."""

    # what
    name: StageName = Field(description="Name of the stage: `train.<name>`, `export.<name>` …")
    task: Literal["pt", "sft"] = Field(
        default="sft", description="`pt`: loss on all text; `sft`: loss on assistant turns only."
    )
    engine: Literal["megatron", "transformers"] = Field(
        default="megatron",
        description="`megatron`: Megatron-Core, with every kind of parallelism; `transformers`: "
        "transformers and peft on data parallel ranks, see deepspeed and fsdp.",
    )
    model: Literal["vlm", "llm"] = Field(
        default="vlm",
        description="`vlm`: the (swapped) vision-language model; `llm`: the LLM donor, before the "
        "swap.",
    )
    data: tuple[str, ...] = Field(min_length=1, description="Names of datasets under `data:`.")
    tuner_type: Literal["full", "lora", "lora_llm", "dora", "qlora"] = Field(
        default="full",
        description="`full`: all unfrozen weights; `lora`: adapters alone; `lora_llm`: adapters in "
        "the language model, the unfrozen weights of the vision side; `dora`: adapters that learn "
        "magnitudes apart; `qlora`: adapters on 4-bit weights (the last two: transformers).",
    )
    target_modules: tuple[str, ...] = Field(
        default=(),
        description="Where adapters go: names or ends of names of linear layers, or `all-linear` "
        "for those of every unfrozen group; empty: every linear layer of the language model.",
    )
    lora_rank: int = Field(default=8, gt=0, description="Rank of an adapter.")
    lora_alpha: int = Field(
        default=32, gt=0, description="An adapter is scaled by lora_alpha / lora_rank."
    )
    use_rslora: bool = Field(
        default=False, description="Scale by lora_alpha / √lora_rank instead (rank-stabilised)."
    )
    freeze_vit: bool = Field(default=False, description="Keep the vision tower as it is.")
    freeze_aligner: bool = Field(default=False, description="Keep the merger(s) as they are.")
    freeze_llm: bool = Field(default=False, description="Keep the language model as it is.")
    trainable_parameters_regex: str = Field(
        default="",
        description="Parameters whose names match train too, although their group is frozen; names "
        "as the engine has them.",
    )
    seed: int = Field(default=1234, ge=0, description="Seed of data order and initialisation.")

    # how long
    train_iters: int = Field(gt=0, description="Optimizer steps.")
    micro_batch_size: int = Field(
        default=1, gt=0, description="Rows a rank computes at once; 1 with packing."
    )
    global_batch_size: int = Field(
        default=1, gt=0, description="Rows of one optimizer step over all ranks; packed rows count."
    )
    max_length: int = Field(
        default=2048, gt=0, description="Tokens in a row at most; see truncation_strategy."
    )
    packing: bool = Field(
        default=True, description="Fill each row with several samples that do not see each other."
    )
    packing_buffer_size: int = Field(
        default=1024, gt=0, description="Samples the packer looks at together."
    )
    dataloader_num_workers: int = Field(
        default=1,
        ge=0,
        description="Processes of a rank that read and decode while it trains; each packs samples "
        "of its own, so it decides the order of the data. 0: the rank does it between steps.",
    )

    # samples
    loss_scale: Literal["default", "last_round", "all"] = Field(
        default="default",
        description="What of a chat is trained: `default`: every assistant turn; `last_round`: the "
        "last one; `all`: all text. A message's own `loss_scale` weighs its turn.",
    )
    truncation_strategy: Literal["delete", "right"] = Field(
        default="delete",
        description="What becomes of a sample longer than max_length: `delete`: it is dropped and "
        "counted; `right`: its end is cut, never inside an image or video.",
    )
    max_pixels: int | None = Field(
        default=None, gt=0, description="Pixels of an image at most; empty: the processor's own."
    )
    min_pixels: int | None = Field(
        default=None, gt=0, description="Pixels of an image at least; empty: the processor's own."
    )
    video_max_pixels: int | None = Field(
        default=None,
        gt=0,
        description="Pixels of a video frame at most; empty: the processor's own.",
    )
    fps: float = Field(default=2.0, gt=0, description="Frames taken a second of video.")
    fps_max_frames: int | None = Field(
        default=None,
        gt=1,
        description="Frames of a video at most, or of each video where the family takes so many of "
        "every one (InternVL, LLaVA-OneVision); empty: the processor's own.",
    )

    # optimizer and schedule
    learning_rate: float = Field(default=1e-5, gt=0, description="Peak learning rate.")
    min_lr: float = Field(default=0.0, ge=0, description="Learning rate at the end.")
    vit_lr: float | None = Field(
        default=None, gt=0, description="Peak learning rate of the vision tower; empty: the same."
    )
    aligner_lr: float | None = Field(
        default=None, gt=0, description="Peak learning rate of the merger(s); empty: the same."
    )
    lr_decay_style: Literal["cosine", "linear", "WSD", "constant"] = Field(
        default="cosine",
        description="Shape of the schedule after warm-up; WSD: constant, then a fall at the end.",
    )
    lr_wsd_decay_iters: int | None = Field(
        default=None, gt=0, description="Steps of the fall at the end of WSD."
    )
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = Field(
        default="exponential", description="Shape of the fall at the end of WSD."
    )
    lr_warmup_iters: int | None = Field(
        default=None, ge=0, description="Steps spent warming up, in place of lr_warmup_fraction."
    )
    lr_warmup_fraction: Fraction = Field(
        default=0.05, description="Share of train_iters spent warming up (0 to 1)."
    )
    weight_decay: float = Field(default=0.1, ge=0, description="AdamW weight decay.")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW beta 1.")
    adam_beta2: float = Field(default=0.95, ge=0, lt=1, description="AdamW beta 2.")
    adam_eps: float = Field(default=1e-8, gt=0, description="AdamW epsilon.")
    clip_grad: float = Field(default=1.0, ge=0, description="Global gradient norm at most; 0: off.")
    torch_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="bfloat16", description="Dtype of weights and activations."
    )
    initial_loss_scale: float = Field(
        default=2.0**32,
        ge=1,
        description="float16: what the loss is multiplied with at first, lest gradients vanish.",
    )
    min_loss_scale: float = Field(
        default=1.0, ge=1, description="float16: that factor at least; an overflow there ends it."
    )
    loss_scale_window: int = Field(
        default=1000, gt=0, description="float16: steps without an overflow that double the factor."
    )
    hysteresis: int = Field(
        default=2, gt=0, description="float16: overflows before the factor is halved."
    )

    # experts
    moe_aux_loss_coeff: float = Field(
        default=0.0, ge=0, description="Weight of the loss that balances experts; 0: off."
    )
    moe_z_loss_coeff: float = Field(
        default=0.0, ge=0, description="Weight of the loss on large router logits; 0: off."
    )

    moe_grouped_gemm: bool = Operational(
        default=False,
        description="Compute a layer's experts together, on a copy of their weights, not in turn.",
    )
    moe_permute_fusion: bool = Operational(
        default=False,
        description="Sort tokens by expert in one kernel of TransformerEngine's; without it, as "
        "if false.",
    )

    # memory
    recompute_granularity: Literal["none", "selective", "full"] = Field(
        default="none", description="What backward computes again rather than keeps."
    )
    recompute_method: Literal["uniform", "block"] = Field(
        default="uniform",
        description="Of `full`: keep what enters each group of recompute_num_layers layers, or "
        "compute the first recompute_num_layers layers of a stage again and keep the rest.",
    )
    recompute_num_layers: int = Field(default=1, gt=0, description="See recompute_method.")
    recompute_modules: tuple[Literal["core_attn", "mlp", "moe"], ...] = Field(
        default=("core_attn",), min_length=1, description="What `selective` computes again."
    )
    vit_gradient_checkpointing: bool = Field(
        default=False, description="Compute the vision tower's layers again in backward."
    )

    optimizer_cpu_offload: bool = Operational(
        default=False, description="Keep AdamW's state and fp32 weights in the host's memory."
    )
    optimizer_offload_fraction: Fraction = Operational(
        default=1.0, description="Share of the trained parameters that is offloaded (0 to 1)."
    )

    # communication
    overlap_grad_reduce: bool = Operational(
        default=False, description="Sum gradients over data parallel ranks during backward."
    )
    overlap_param_gather: bool = Operational(
        default=False, description="Gather updated weights during the next forward pass."
    )
    ddp_bucket_size: int | None = Operational(
        default=None,
        gt=0,
        description="Parameters that overlap_grad_reduce sends together; empty: 40 million, or one "
        "million a data parallel rank where that is more.",
    )

    # layout
    deepspeed: Literal["zero2", "zero2_offload", "zero3", "zero3_offload"] | None = Field(
        default=None,
        description="transformers: ranks share gradients and optimizer (`zero2`), weights too "
        "(`zero3`); `_offload` keeps what is shared in the host's memory. Empty: a rank has all.",
    )
    fsdp: Literal["fsdp2"] | None = Field(
        default=None,
        description="transformers: ranks share weights, gradients and optimizer by torch's own "
        "FSDP2; for models that do not fit one GPU.",
    )
    nproc_per_node: int = Field(
        default=1, gt=0, description="Ranks that torchrun starts on each node."
    )
    nnodes: int = Field(default=1, gt=0, description="Machines that train the stage together.")
    node_rank: int | None = Operational(
        default=None, ge=0, description="Which of them this is, from 0; empty: $NODE_RANK, else 0."
    )
    master_addr: str | None = Operational(
        default=None, description="Address of the first of them; empty: $MASTER_ADDR."
    )
    master_port: int | None = Operational(
        default=None,
        ge=1,
        le=65535,
        description="Port where they meet; empty: $MASTER_PORT, else 29500.",
    )
    tensor_model_parallel_size: int = Field(default=1, gt=0, description="Tensor parallel size.")
    sequence_parallel: bool = Field(
        default=False, description="Split norms and dropout over the tensor parallel ranks too."
    )
    pipeline_model_parallel_size: int = Field(
        default=1, gt=0, description="Stages that the layers are dealt into."
    )
    virtual_pipeline_model_parallel_size: int = Field(
        default=1, gt=0, description="Chunks of layers that each pipeline stage holds."
    )
    context_parallel_size: int = Field(
        default=1, gt=0, description="Ranks that share the tokens of a row."
    )
    expert_model_parallel_size: int = Field(
        default=1, gt=0, description="Parts that the experts of a layer are dealt into."
    )
    expert_tensor_parallel_size: int = Field(
        default=1, gt=0, description="Parts that each expert is cut into."
    )

    # held-out loss
    eval_interval: int | None = Field(
        default=None,
        gt=0,
        description="Steps between evaluations on what the stage's datasets hold out, and one at "
        "the end; empty: none.",
    )
    eval_iters: int = Field(
        default=10, gt=0, description="Batches of global_batch_size an evaluation reads at most."
    )
    eval_split: Literal["val", "test"] = Field(
        default="val", description="The split that is held out; see split_ratios of a dataset."
    )
    load_best_model_at_end: bool = Field(
        default=False,
        description="The stage ends with the weights of the lowest held-out loss, not the last.",
    )

    # running it
    save_interval: int = Operational(
        default=100, gt=0, description="Steps between checkpoints a killed run goes on from."
    )
    save_total_limit: int = Operational(
        default=1, gt=0, description="Such checkpoints that are kept at a time, the newest ones."
    )
    async_save: bool = Operational(
        default=False, description="Write those checkpoints beside the training that goes on."
    )
    cache_encoded_samples: bool = Operational(
        default=False,
        description="Keep tokens, decoded images and videos on disk, so that later epochs and "
        "stages read them; takes about ten times the room of the data.",
    )
    max_encoded_bytes: int = Operational(
        default=100 * 1024**3,
        gt=0,
        description="What cache_encoded_samples of all stages may have left behind when a stage "
        "begins; beyond, the longest unused samples are removed first.",
    )
    log_interval: int = Operational(default=10, gt=0, description="Steps between progress lines.")
    num_threads: int = Operational(default=1, gt=0, description="CPU threads of a rank.")

    @model_validator(mode="after")
    def _consistent(self) -> TrainStage:
        if faults := stage_faults(self):
            raise CrossFieldError(faults)
        return self

    @property
    def layout(self) -> Layout:
        """How the model lies over ranks."""
        return Layout(**{field.name: getattr(self, field.name) for field in fields(Layout)})

    @property
    def shares_weights_by_deepspeed(self) -> bool:
        """Whether ranks hold parts of the weights, which DeepSpeed gathers module by module."""
        return self.deepspeed in ("zero3", "zero3_offload")

    @property
    def row_multiple(self) -> int:
        """Rows are padded to a multiple of so many tokens, so that ranks hold equal parts."""
        tensor = self.tensor_model_parallel_size if self.sequence_parallel else 1
        context = self.context_parallel_size
        return tensor * (2 * context if context > 1 else 1)

    @property
    def num_ranks(self) -> int:
        """Ranks on all nodes."""
        return self.nproc_per_node * self.nnodes

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one replica of all but the experts."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )

    @property
    def data_parallel_size(self) -> int:
        """Ranks that read different data."""
        return self.num_ranks // self.model_parallel_size

    @property
    def num_micro_batches(self) -> int:
        """Micro batches of one optimizer step on a rank."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)
