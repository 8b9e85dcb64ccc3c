"""Megatron's last work on a step's gradients, without a walk over all modules that finds nothing.

Megatron-Core 0.16 asks each module whether it holds what only a bias of experts or a global
balancing loss leaves behind, also where the model has neither. It ends when Megatron asks the
config first.
"""

from __future__ import annotations

import importlib
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig


def install() -> None:
    """Teaches Megatron's `finalize_model_grads`; safe to call twice."""
    # the package has a function of the module's name
    module: Any = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    original = module.reset_model_temporary_tensors
    if getattr(original, "asks_first", False):
        return

    def reset_model_temporary_tensors(config: TransformerConfig, model: Any) -> None:
        if leaves_tensors(config):
            original(config, model)

    reset_model_temporary_tensors.asks_first = True  # type: ignore[attr-defined]
    module.reset_model_temporary_tensors = reset_model_temporary_tensors


def leaves_tensors(config: TransformerConfig) -> bool:
    """Whether a step leaves in modules what must not reach the next one."""
    kinds = config.moe_router_load_balancing_type  # one, or a list
    return config.moe_router_enable_expert_bias or "global_aux_loss" in kinds
