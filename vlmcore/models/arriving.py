"""Weights that are still on their way from other ranks, for whoever reads one outside its module.

With `overlap_param_gather` Megatron waits for a weight in the forward pre-hook of the module that
holds it. Code that reads a weight without calling that module would read last step's.
"""

from __future__ import annotations

from torch import nn


def await_weights(module: nn.Module) -> None:
    """Returns once the weights that `module` itself holds have arrived."""
    for hook in list(module._forward_pre_hooks.values()):
        hook(module, ())
