"""A remedy for Megatron-Core 0.16: optimizer state of several gradient buckets, saved right.

Its `fully_reshardable` checkpoints join the buckets of a buffer without the padding between them,
then cut parameters out at places that count the padding. Whatever lies behind the first bucket is
saved shifted, with a warning; tied embeddings on a pipeline's last stage have a bucket of their
own. Ends when Megatron's own `get_parameter_state_dp_zero` keeps the padding.
"""

from __future__ import annotations

from typing import Any

from megatron.core import __version__
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


def install() -> None:
    """Teaches the distributed optimizer; safe to call twice."""
    cls: Any = DistributedOptimizer
    original = cls.get_parameter_state_dp_zero
    if not __version__.startswith("0.16.") or getattr(original, "keeps_padding", False):
        return

    def get_parameter_state_dp_zero(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = original(self, *args, **kwargs)
        for index, buffer in enumerate(self.buffers):
            for tensors in (state or {}).get(index, {}).values():
                for name, flat in tensors.items():
                    if isinstance(flat, Tensor):
                        tensors[name] = _with_padding(flat, buffer)
        return state

    get_parameter_state_dp_zero.keeps_padding = True  # type: ignore[attr-defined]
    cls.get_parameter_state_dp_zero = get_parameter_state_dp_zero


def _with_padding(flat: Tensor, buffer: Any) -> Tensor:
    """The buckets of a buffer at their places in it."""
    whole = flat.new_zeros(buffer.numel)
    begin = 0
    for bucket in buffer.buckets:
        end = begin + bucket.numel_unpadded
        whole[bucket.offset : bucket.offset + bucket.numel_unpadded] = flat[begin:end]
        begin = end
    return whole
