"""What a LoRA adapter changes: peft's config spelled out for one base, with its places in Megatron.

peft itself reads the config (target modules, patterns of ranks and alphas, fused experts), on a
model without memory, so what is expected of an adapter is what peft would load.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from vlmcore.errors import WeightError
from vlmcore.families import Config, Family, family_of, read_config
from vlmcore.weights.architecture import architecture_shapes
from vlmcore.weights.plan import build_plan

if TYPE_CHECKING:
    from peft import LoraConfig

Shape = tuple[int, ...]
Factor = Literal["A", "B"]
FACTORS: tuple[Factor, ...] = ("A", "B")

CONFIG = "adapter_config.json"
# What a LoraConfig may say; any other field has to keep its default.
_UNDERSTOOD = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout",
    "use_rslora", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "target_parameters", "megatron_config", "megatron_core", "runtime_config",
}  # fmt: skip
_KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva")  # the others change base weights


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One low-rank update, W + scale · B · A; for stacked experts one for each of them.

    Attributes:
        hf_key: The tensor it changes, as transformers holds it in memory.
        peft_name: What stands between peft's prefix and `.lora_A.weight`.
        mcore_key: What stands before `.lora_A` in torch_dist: the linear layer, without a layer
            number, `.adapter.` and the HF projection.
        layer: Place in the stack of decoder layers; None outside of it.
        num_experts: None where the matrix is one.
    """

    hf_key: str
    peft_name: str
    mcore_key: str
    layer: int | None
    num_experts: int | None
    in_features: int
    out_features: int
    rank: int
    scale: float

    @property
    def gate_and_up(self) -> bool:
        """Whether the rows are the two halves of an expert's first layer."""
        return self.hf_key.endswith(".gate_up_proj")

    @property
    def experts(self) -> Iterator[int | None]:
        """Indices of its matrices."""
        yield from [None] if self.num_experts is None else range(self.num_experts)

    @property
    def stack(self) -> int:
        """Leading dimensions (layer, expert) of its global tensors."""
        return (self.layer is not None) + (self.num_experts is not None)

    def shape(self, factor: Factor, rank: int) -> Shape:
        """Shape of one matrix of the factor at a rank."""
        return (rank, self.in_features) if factor == "A" else (self.out_features, rank)


@dataclass(frozen=True)
class AdapterPlan:
    """All adapters of a model, and peft's config that asks for them."""

    adapters: tuple[Adapter, ...]
    num_layers: int
    config: Mapping[str, Any]

    @cached_property
    def stacks(self) -> dict[str, dict[int | None, Adapter]]:
        """Megatron key → layer → adapter."""
        stacks: dict[str, dict[int | None, Adapter]] = defaultdict(dict)
        for adapter in self.adapters:
            stacks[adapter.mcore_key][adapter.layer] = adapter
        return dict(stacks)

    def rank(self, mcore_key: str) -> int:
        """Rank of the global tensors: the largest of the stack."""
        return max(adapter.rank for adapter in self.stacks[mcore_key].values())

    @cached_property
    def global_shapes(self) -> dict[str, Shape]:
        """Key → shape of every global tensor."""
        shapes = {}
        for mcore_key, stack in self.stacks.items():
            adapter = next(iter(stack.values()))
            dims: Shape = () if adapter.layer is None else (self.num_layers,)
            dims += () if adapter.num_experts is None else (adapter.num_experts,)
            for factor in FACTORS:
                matrix = adapter.shape(factor, self.rank(mcore_key))
                if factor == "B" and adapter.gate_and_up:
                    matrix = (2, matrix[0] // 2, matrix[1])
                shapes[f"{mcore_key}.lora_{factor}"] = (*dims, *matrix)
        return shapes


def plan_adapters(base_dir: Path, config: LoraConfig) -> AdapterPlan:
    """The adapters that a peft config asks for on a base.

    Args:
        base_dir: HF folder of the base; its config.json is enough.
        config: Left as it is.

    Raises:
        WeightError: A field asks for more than LoRA on linear layers, nothing matches, or a matched
            module is no linear layer of this base.
    """
    _check_config(config)
    hf_config = read_config(base_dir)
    family = family_of(hf_config)
    places = _places(family, hf_config, architecture_shapes(base_dir))
    asked = copy.deepcopy(config)
    asked.inference_mode = True
    asked.init_lora_weights = True  # how an adapter began is of no use later
    adapters, faults = [], []
    for name, layer in _peft_layers(base_dir, family, asked):
        kind = type(layer.get_base_layer()).__name__
        module = name.replace(".base_layer", "")
        hf_key = f"{module}.{getattr(layer, 'parameter_name', 'weight')}"
        if type(layer).__name__ not in ("Linear", "ParamWrapper") or hf_key not in places:
            faults.append(f"{module}: a {kind} takes no adapter")
            continue
        mcore_key, place = places[hf_key]
        adapters.append(
            Adapter(
                hf_key=hf_key,
                peft_name=name,
                mcore_key=mcore_key,
                layer=place,
                num_experts=None if hf_key.endswith(".weight") else layer.num_experts,
                in_features=layer.in_features,
                out_features=layer.out_features,
                rank=layer.r["default"],
                scale=layer.scaling["default"],
            )
        )
    if faults:
        raise WeightError(
            f"{family.model_type}: {CONFIG} matches {len(faults)} module(s) that are no linear "
            "layer; name others in target_modules:\n  " + "\n  ".join(faults)
        )
    num_layers = family.language_model(hf_config).num_layers
    return AdapterPlan(tuple(adapters), num_layers, _as_json(asked))


def read_adapter_config(folder: Path) -> LoraConfig:
    """The peft config of an adapter folder.

    Raises:
        WeightError: There is none, or it is of another method.
    """
    from peft import LoraConfig, PeftConfig

    if not (folder / CONFIG).is_file():
        raise WeightError(f"{folder / CONFIG} is missing; expected a folder that peft saved")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise WeightError(f"{folder / CONFIG}: {error}") from error
    if not isinstance(config, LoraConfig):
        raise WeightError(f"{folder / CONFIG}: peft_type is {config.peft_type}, expected LORA")
    return config


def write_adapter_config(plan: AdapterPlan, folder: Path) -> None:
    """Writes the plan's config as peft's adapter_config.json."""
    (folder / CONFIG).write_text(json.dumps(plan.config, indent=2, sort_keys=True) + "\n")


def _check_config(config: LoraConfig) -> None:
    default = type(config)()
    faults = [
        f"{name} is {value!r}, expected {getattr(default, name)!r}"
        for name, value in sorted(vars(config).items())
        if name not in _UNDERSTOOD and (value or None) != (getattr(default, name) or None)
    ]
    if config.init_lora_weights not in _KEEPS_BASE:
        faults.append(
            f"init_lora_weights is {config.init_lora_weights!r}, which changes the base weights; "
            f"save the adapter with peft's path_initial_model_for_weight_conversion"
        )
    if faults:
        raise WeightError(
            f"{CONFIG} asks for more than LoRA on linear layers:\n  " + "\n  ".join(faults)
        )


def _peft_layers(base_dir: Path, family: Family, config: LoraConfig) -> list[tuple[str, Any]]:
    """Name and layer of every adapter that peft adds; `config` becomes what peft makes of it.

    Nothing is allocated: model and adapters stand on the meta device.
    """
    import transformers
    from peft import inject_adapter_in_model
    from peft.tuners.lora.layer import LoraLayer

    hf_config = transformers.AutoConfig.from_pretrained(base_dir)
    with torch.device("meta"):
        model = getattr(transformers, family.architecture)(hf_config)
    try:
        inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
    except ValueError as error:
        raise WeightError(f"{CONFIG} does not fit {base_dir}: {error}") from error
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]


def _places(
    family: Family, config: Config, shapes: Mapping[str, Shape]
) -> dict[str, tuple[str, int | None]]:
    """HF key in memory → (adapter's Megatron key, layer) of every tensor that Megatron holds."""
    places = {}
    for region in build_plan(family, config, shapes).regions:
        stacked = len(region.shape) > len(region.hf_shapes[0])
        for source in region.sources:
            piece = source.key.removesuffix(".weight").rpartition(".")[2].removesuffix("_proj")
            mcore_key = f"{region.mcore_key.removesuffix('.weight')}.adapter.{piece}"
            places[source.key] = (mcore_key, region.offset[0] if stacked else None)
    return places


def _as_json(config: LoraConfig) -> dict[str, Any]:
    """The config as peft writes it, with sets in order: an artifact's digest covers the file."""
    fields = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in config.to_dict().items()
        if name != "runtime_config"
    }
    return fields | {"peft_type": "LORA"}
