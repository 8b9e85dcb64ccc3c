"""Pure tensor transforms between HF and Megatron-Core layouts; both directions side by side.

Layout differences handled here:
- q, k, v: HF keeps three matrices ordered by head; Megatron-Core interleaves them by kv group, so
  that tensor parallel ranks cut between groups (megatron-core 0.16, SelfAttention).
- experts stored input dimension first are transposed.

Shape suffixes: N query heads, G kv groups, Q = N / G query heads a group, D head dim, R = rows of
the fused matrix (G · (Q + 2) · D), `…` the trailing dimension H of a weight, none for a bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


def fuse_qkv(q: Tensor, k: Tensor, v: Tensor, *, num_query_groups: int, kv_channels: int) -> Tensor:
    """HF's q [N·D, …], k and v [G·D, …] as Megatron's interleaved [R, …]."""
    groups, dim = num_query_groups, kv_channels
    rest = q.shape[1:]
    fused = torch.cat(
        [
            q.reshape(groups, -1, *rest),
            k.reshape(groups, dim, *rest),
            v.reshape(groups, dim, *rest),
        ],
        dim=1,
    )
    return fused.reshape(-1, *rest)


def split_qkv(
    fused: Tensor, *, num_query_groups: int, kv_channels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's interleaved [R, …] as HF's q [N·D, …], k and v [G·D, …]."""
    groups, dim = num_query_groups, kv_channels
    rest = fused.shape[1:]
    by_group = fused.reshape(groups, -1, *rest)
    q, k, v = by_group.split([by_group.shape[1] - 2 * dim, dim, dim], dim=1)
    return q.reshape(-1, *rest), k.reshape(-1, *rest), v.reshape(-1, *rest)


class Transform(Protocol):
    """What turns the HF pieces of a region into its Megatron tensor, and back exactly."""

    def to_mcore(self, *pieces: Tensor) -> Tensor:
        """The Megatron tensor, without the dimensions of the layer stack."""
        ...

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The HF pieces."""
        ...


@dataclass(frozen=True)
class Copy:
    """One piece, byte for byte."""

    def to_mcore(self, *pieces: Tensor) -> Tensor:  # noqa: D102
        return pieces[0]

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        return (tensor,)


@dataclass(frozen=True)
class InterleaveQKV:
    """q, k and v, weights or biases."""

    num_query_groups: int
    kv_channels: int

    def to_mcore(self, *pieces: Tensor) -> Tensor:  # noqa: D102
        q, k, v = pieces
        return fuse_qkv(
            q, k, v, num_query_groups=self.num_query_groups, kv_channels=self.kv_channels
        )

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        return split_qkv(
            tensor, num_query_groups=self.num_query_groups, kv_channels=self.kv_channels
        )


@dataclass(frozen=True)
class Transpose:
    """One matrix stored the other way round."""

    def to_mcore(self, *pieces: Tensor) -> Tensor:  # noqa: D102
        return pieces[0].T

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        return (tensor.T,)
