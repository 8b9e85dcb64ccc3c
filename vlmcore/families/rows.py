"""The row kinds of a weight map: data only, read in both directions by `vlmcore.weights`.

An HF key may hold the placeholder `{layer}`. The Megatron-Core tensor of such a row is global over
the whole stack and has a leading layer dimension, the way torch_dist stores homogeneous layers;
its key holds no layer number.
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
class Tied:
    """An HF tensor that repeats another one where the config ties them; Megatron shares storage."""

    hf: str
    to: str


@dataclass(frozen=True)
class Drop:
    """An HF tensor that has no place in Megatron, and why losing it is right."""

    hf: str
    reason: str


Row = Rename | Subtree | FuseQKV | FuseGateUp | Tied | Drop


def hf_patterns(row: Row) -> tuple[str, ...]:
    """The HF key patterns that a row consumes."""
    match row:
        case FuseQKV():
            return (row.q, row.k, row.v)
        case FuseGateUp():
            return (row.gate, row.up)
        case _:
            return (row.hf,)
