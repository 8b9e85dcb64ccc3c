"""The row kinds of a weight map: data only, read in both directions by `vlmcore.weights`.

HF keys are written in the form that transformers 5 uses in memory; `Family.memory_key` brings what
stands on disk into it. A key may hold the placeholder `{layer}`: the Megatron-Core tensor of such a
row is global over the whole stack and has a leading layer dimension, the way torch_dist stores
homogeneous layers; its key holds no layer number. The same holds for `{expert}`, a second leading
dimension.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rename:
    """One HF tensor is one Megatron tensor, byte for byte."""

    hf: str
    mcore: str


@dataclass(frozen=True)
class Subtree:
    """Every HF tensor under a prefix keeps its name below another prefix, byte for byte."""

    hf: str
    mcore: str


@dataclass(frozen=True)
class FuseQKV:
    """Three HF projections (weights or biases) are one Megatron tensor, interleaved by kv group."""

    q: str
    k: str
    v: str
    mcore: str


@dataclass(frozen=True)
class FuseGateUp:
    """HF's gate and up projections are the two halves of Megatron's `linear_fc1`."""

    gate: str
    up: str
    mcore: str


@dataclass(frozen=True)
class StackExperts:
    """The experts of a layer in any of the layouts that checkpoints hold; the shapes decide which.

    - one tensor an expert: `{hf}{expert}.gate_proj.weight`, `.up_proj.weight`, `.down_proj.weight`
      (Qwen3-MoE on the hub);
    - all experts in one, output dimension first: `{hf}gate_up_proj` [E, 2I, H], `{hf}down_proj`
      [E, H, I] (transformers 5);
    - all experts in one, input dimension first: [E, H, 2I] and [E, I, H] (Qwen3-VL-MoE on the hub).

    Megatron stores `linear_fc1.weight` [E, 2I, H] and `linear_fc2.weight` [E, H, I].
    """

    hf: str  # up to and with `experts.`
    mcore: str  # likewise


@dataclass(frozen=True)
class Tied:
    """An HF tensor that repeats another one where the config ties them; Megatron shares storage."""

    hf: str
    to: str


@dataclass(frozen=True)
class Drop:
    """An HF tensor that has no place in Megatron, and why losing it is right."""

    hf: str
    reason: str


Row = Rename | Subtree | FuseQKV | FuseGateUp | StackExperts | Tied | Drop
