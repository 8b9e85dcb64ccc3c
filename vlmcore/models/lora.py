"""LoRA on Megatron-Core's parallel linear layers, an adapter for each HF matrix inside them.

Megatron fuses q, k, v and gate, up; their adapters stay apart here, as peft has them, and their
outputs are put where the fused layer has theirs. Across tensor parallel ranks
- a column-parallel layer holds `lora_A` whole and cuts `lora_B` as its own rows are cut;
- a row-parallel one cuts `lora_A` as its own columns are cut and holds `lora_B` whole;
- what is communicated is the rank-wide product in between, never the hidden size.
The vision side's linear layers, plain torch modules on every rank, take their adapters whole.

Shape suffixes: S tokens, B rows of a batch, H input, Z the adapters' ranks together, O output.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from vlmcore.errors import TrainError
from vlmcore.models.arriving import await_weights
from vlmcore.models.build import sharded_state_dict
from vlmcore.models.linear import ColumnLinear, RowLinear
from vlmcore.weights.adapter_plan import AdapterPlan, write_adapter_config
from vlmcore.weights.adapters import AdapterSource
from vlmcore.weights.convert import CHECKPOINT

Shape = tuple[int, ...]
_MARK = ".adapter."  # in the names of adapter parameters and their global tensors
# What a column-parallel layer may be made of, in the order of its rows.
_COLUMN_PIECES = (("q", "k", "v"), ("gate", "up"), ("gate_up",))


class LowRank(nn.Module):
    """One adapter: x → scale · B · A · x.

    Args:
        a_shape: `lora_A` on this rank, [R, H].
        b_shape: `lora_B` on this rank, [O, R], or [2, O / 2, R] for gate and up together.
        scale: What the product is multiplied with.
        like: A parameter of the base layer, whose device and dtype it gets.
    """

    def __init__(self, a_shape: Shape, b_shape: Shape, *, scale: float, like: Tensor) -> None:
        super().__init__()
        self.scale = scale
        self.lora_A = nn.Parameter(like.new_zeros(a_shape))
        self.lora_B = nn.Parameter(like.new_zeros(b_shape))

    def expand(self, z: Tensor, b: Tensor) -> Tensor:
        """From the rank-wide product to the output."""
        return F.linear(z, b.flatten(0, -2)) * self.scale


class LoraColumn(ColumnLinear):
    """A column-parallel layer with adapters; an existing layer becomes one through `attach`."""

    adapter: nn.ModuleDict
    widths: Sequence[int]  # of q, k and v in a kv group, or of gate and up; on this rank
    groups: int  # kv groups on this rank

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Base output with the adapters' added [S, B, O], and the base's bias."""
        output, bias = super().forward(input_, *args, **kwargs)
        return output + self._adapters(input_), bias

    def _adapters(self, x_SBH: Tensor) -> Tensor:
        a_ZH = torch.cat([low_rank.lora_A for low_rank in _low_ranks(self)])
        if self.explicit_expert_comm:
            # tokens come whole to each rank, and their gradients are summed elsewhere
            a_ZH = copy_to_tensor_model_parallel_region(a_ZH, group=self.tp_group)
        z_SBZ = F.linear(x_SBH, a_ZH)
        if not self.explicit_expert_comm:
            if self.sequence_parallel:
                z_SBZ = gather_from_sequence_parallel_region(z_SBZ, group=self.tp_group)
            else:
                z_SBZ = copy_to_tensor_model_parallel_region(z_SBZ, group=self.tp_group)
        ranks = [low_rank.lora_A.shape[0] for low_rank in _low_ranks(self)]
        parts = dict(zip(self.adapter, z_SBZ.split(ranks, dim=-1), strict=True))
        if "gate_up" in parts:
            low_rank = cast(LowRank, self.adapter["gate_up"])
            return low_rank.expand(parts["gate_up"], low_rank.lora_B)
        return self._fuse(parts)

    def update(self) -> Tensor:
        """What the adapters add to the weight on this rank, [O, H]."""
        factors = zip(self.adapter, _low_ranks(self), strict=True)
        parts = {name: low_rank.lora_A.T for name, low_rank in factors}
        if "gate_up" in parts:
            low_rank = cast(LowRank, self.adapter["gate_up"])
            return low_rank.expand(parts["gate_up"], low_rank.lora_B).T
        return self._fuse(parts).T

    def _fuse(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The pieces' outputs in the order of the fused rows; zero where one has no adapter."""
        some = next(iter(parts.values()))
        lead = some.shape[:-1]
        names = next(names for names in _COLUMN_PIECES if set(parts) <= set(names))
        outputs = []
        for name, width in zip(names, self.widths, strict=True):
            if name in parts:
                low_rank = cast(LowRank, self.adapter[name])
                piece = low_rank.expand(parts[name], low_rank.lora_B)
                outputs.append(piece.view(*lead, self.groups, width))
            else:
                outputs.append(some.new_zeros(*lead, self.groups, width))
        return torch.cat(outputs, dim=-1).flatten(-2)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The base's entries, and the adapters' with `lora_B` cut."""
        base = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return base | _sharded(self, "lora_B", prefix, sharded_offsets, metadata)


class LoraRow(RowLinear):
    """A row-parallel layer with an adapter; an existing layer becomes one through `attach`."""

    adapter: nn.ModuleDict

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Base output with the adapter's added [S, B, O], and the base's bias."""
        output, bias = super().forward(input_)
        (low_rank,) = _low_ranks(self)
        z_SBZ, b = F.linear(input_, low_rank.lora_A), low_rank.lora_B
        if self.explicit_expert_comm:
            # outputs stay partial sums here, so each rank sees a part of B's gradient
            b = copy_to_tensor_model_parallel_region(b, group=self.tp_group)
        elif self.sequence_parallel:
            z_SBZ = reduce_scatter_to_sequence_parallel_region(z_SBZ, group=self.tp_group)
        else:
            z_SBZ = reduce_from_tensor_model_parallel_region(z_SBZ, group=self.tp_group)
        return output + low_rank.expand(z_SBZ, b), bias

    def update(self) -> Tensor:
        """What the adapter adds to the weight on this rank, [O, H]."""
        (low_rank,) = _low_ranks(self)
        return low_rank.expand(low_rank.lora_A.T, low_rank.lora_B).T

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The base's entries, and the adapter's with `lora_A` cut."""
        base = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return base | _sharded(self, "lora_A", prefix, sharded_offsets, metadata)


class LoraLinear(nn.Linear):
    """A plain layer of the vision side with an adapter."""

    adapter: nn.ModuleDict

    def forward(self, input: Tensor) -> Tensor:
        """Base output with the adapter's added."""
        (low_rank,) = _low_ranks(self)
        return super().forward(input) + low_rank.expand(
            F.linear(input, low_rank.lora_A), low_rank.lora_B
        )

    def update(self) -> Tensor:
        """What the adapter adds to the weight, [O, H]."""
        (low_rank,) = _low_ranks(self)
        return low_rank.expand(low_rank.lora_A.T, low_rank.lora_B).T


def apply_lora(chunks: Sequence[MegatronModule], plan: AdapterPlan) -> None:
    """Freezes a model and gives it the adapters of a plan, all zero; fill them by `load_adapter`.

    Args:
        chunks: This rank's chunks, base weights loaded or not.
        plan: What peft's config asks for on this base.

    Raises:
        TrainError: A planned module takes no adapter in the Megatron model, or the config asks for
            dropout.
    """
    if dropout := plan.config["lora_dropout"]:
        raise TrainError(
            f"lora_dropout is {dropout}, which Megatron ranks do not compute; set it to 0 (it has "
            f"no part in the weights of a trained adapter)"
        )
    planned: dict[str, list[str]] = defaultdict(list)
    for mcore_key in plan.stacks:
        planned[mcore_key.partition(_MARK)[0]].append(mcore_key)
    faults = []
    for chunk in chunks:
        homes = _homes(chunk)
        for parameter in chunk.parameters():
            parameter.requires_grad_(False)
        for name, (linear, layer) in homes.items():
            keys = planned.get(linear)
            if keys and (fault := _attach(chunk.get_submodule(name), plan, keys, layer)):
                faults.append(f"{name}: {fault}")
    if faults:
        raise TrainError("modules that take no adapter:\n  " + "\n  ".join(faults))


def load_adapter(chunks: Sequence[MegatronModule], source: AdapterSource) -> None:
    """Fills this rank's adapters; each reads only its own boxes, at any parallel layout."""
    with torch.no_grad():
        for part in _adapter_parts(chunks):
            assert part.data is not None
            shape = (1,) * part.prepend_axis_num + tuple(part.local_shape)
            box = source.read(part.key, tuple(part.global_offset), shape)
            part.data.copy_(box.view(part.data.shape))


def merge_lora(chunks: Sequence[MegatronModule]) -> None:
    """Adds the adapters to the weights, in fp32 and rounded once, and takes them off."""
    with torch.no_grad():
        for module in [module for chunk in chunks for module in chunk.modules()]:
            if isinstance(module, LoraColumn | LoraRow | LoraLinear):
                module.adapter.float()
                module.weight.copy_(module.weight.float() + module.update())
                del module.adapter
                module.__class__ = type(module).__base__  # type: ignore[assignment]


def save_adapter(chunks: Sequence[MegatronModule], plan: AdapterPlan, folder: Path) -> None:
    """Writes a Megatron adapter folder, for `McoreAdapter`; call on every rank.

    Args:
        chunks: This rank's chunks; their base weights are left out.
        plan: What `apply_lora` took.
        folder: New folder; gets `checkpoint/` (torch_dist) and adapter_config.json.
    """
    if dist.get_rank() == 0:
        (folder / CHECKPOINT).mkdir(parents=True)
        write_adapter_config(plan, folder)
    dist.barrier()
    state = {f"{i}": part for i, part in enumerate(_adapter_parts(chunks))}
    dist_checkpointing.save(state, str(folder / CHECKPOINT))


def _adapter_parts(chunks: Sequence[MegatronModule]) -> Iterator[ShardedTensor]:
    """The boxes of the adapters' global tensors on this rank; their data are the parameters."""
    for chunk in chunks:
        for part in sharded_state_dict(chunk).values():
            if isinstance(part, ShardedTensor) and _MARK in part.key:
                yield part


def _homes(chunk: MegatronModule) -> dict[str, tuple[str, int | None]]:
    """Module of this rank → (global name without a layer number, layer), as Megatron states it."""
    homes = {}
    for name, part in sharded_state_dict(chunk).items():
        if not name.endswith(".weight"):
            continue
        whole = part.build()[0] if isinstance(part, ShardedTensorFactory) else part
        layer = whole.global_offset[0] if whole.prepend_axis_num else None
        homes[name.removesuffix(".weight")] = (part.key.removesuffix(".weight"), layer)
    return homes


def _attach(
    module: nn.Module, plan: AdapterPlan, keys: Sequence[str], layer: int | None
) -> str | None:
    """Turns a linear layer into one with adapters, in place; says why where it cannot."""
    pieces = {key.partition(_MARK)[2]: key for key in keys}
    if isinstance(module, ColumnParallelLinear):
        fault = _prepare_column(module, pieces)
        if fault:
            return fault
        module.__class__ = LoraColumn
    elif isinstance(module, RowParallelLinear):
        module.__class__ = LoraRow
    elif type(module) is nn.Linear:
        module.__class__ = LoraLinear
    else:
        return f"a {type(module).__name__} is no linear layer"
    module.adapter = nn.ModuleDict()
    for piece, key in pieces.items():
        own = plan.stacks[key].get(layer)
        scale = own.scale if own is not None else 0.0
        shapes = _local_shapes(module, plan, key)
        low_rank = LowRank(*shapes, scale=scale, like=module.weight)
        _mark(module, low_rank)
        module.adapter[piece] = low_rank
    return None


def _prepare_column(module: Any, pieces: Mapping[str, str]) -> str | None:
    """Notes how the rows of a fused layer are made up; says why where that is unknown."""
    names = next((names for names in _COLUMN_PIECES if set(pieces) <= set(names)), None)
    if names is None:
        return f"no adapter on {', '.join(sorted(pieces))}; leave it out of target_modules"
    module.groups, module.widths = 1, [module.output_size_per_partition // len(names)] * len(names)
    if names[0] == "q":
        config, size = module.config, dist.get_world_size(module.tp_group)
        if config.num_query_groups % size:
            return (
                f"tensor_model_parallel_size {size} cuts inside the {config.num_query_groups} kv "
                f"heads; use a divisor of {config.num_query_groups} with LoRA"
            )
        module.groups = config.num_query_groups // size
        queries = config.num_attention_heads // config.num_query_groups
        module.widths = [queries * config.kv_channels, config.kv_channels, config.kv_channels]
    return None


def _local_shapes(module: nn.Module, plan: AdapterPlan, key: str) -> tuple[Shape, Shape]:
    """Shapes of `lora_A` and `lora_B` on this rank."""
    dims = next(iter(plan.stacks[key].values())).stack
    a, b = (plan.global_shapes[f"{key}.lora_{factor}"][dims:] for factor in "AB")
    if isinstance(module, LoraColumn):
        b = (*b[:-2], b[-2] // dist.get_world_size(module.tp_group), b[-1])
    elif isinstance(module, LoraRow):
        a = (a[0], a[1] // dist.get_world_size(module.tp_group))
    return a, b


def _mark(module: nn.Module, low_rank: LowRank) -> None:
    """Tells Megatron which parameters ranks hold in parts, and which get a part of the gradient."""
    if isinstance(module, LoraColumn):
        split, whole, axis = low_rank.lora_B, low_rank.lora_A, low_rank.lora_B.ndim - 2
    elif isinstance(module, LoraRow):
        split, whole, axis = low_rank.lora_A, low_rank.lora_B, 1
    else:
        return
    for parameter in low_rank.parameters():
        # gradients of experts are reduced over the ranks that hold the same part of the same ones;
        # Megatron's own layers forget experts that are cut but not dealt out
        parameter.allreduce = not module.explicit_expert_comm  # type: ignore[attr-defined]
    set_tensor_model_parallel_attributes(split, True, axis, 1)
    if module.is_expert and dist.get_world_size(module.tp_group) == 1:
        # tensor parallel ranks hold different experts: no copy that the gradient norm leaves out
        set_tensor_model_parallel_attributes(whole, True, axis, 1)
    if not module.is_expert:
        whole.sequence_parallel = module.sequence_parallel  # type: ignore[attr-defined]


def _low_ranks(module: LoraColumn | LoraRow | LoraLinear) -> list[LowRank]:
    for low_rank in module.adapter.values():
        await_weights(low_rank)  # nobody calls it
    return [cast(LowRank, low_rank) for low_rank in module.adapter.values()]


def _sharded(
    module: LoraColumn | LoraRow, cut: str, prefix: str, sharded_offsets: Any, metadata: Any
) -> dict[str, Any]:
    """The adapters' entries in a sharded state dict; the parameter named `cut` is in parts."""
    state = module.adapter.state_dict(keep_vars=True)
    axes = {name: _cut_axis(tensor, cut) for name, tensor in state.items() if name.endswith(cut)}
    sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
        state,
        f"{prefix}adapter.",
        axes,
        sharded_offsets,
        tp_group=module.tp_group,
        dp_cp_group=metadata["dp_cp_group"],
    )
    return sharded


def _cut_axis(tensor: Tensor, cut: str) -> int:
    return 1 if cut == "lora_A" else tensor.ndim - 2
