"""Checkpoints in blocks of float8 (DeepSeek, Qwen FP8), presented as the numbers they stand for.

A weight `X` [..., out, in] of type F8_E4M3 comes with `X_scale_inv` [..., ⌈out/b⌉, ⌈in/b⌉]: every
element is its code times the scale of its b × b block (transformers 5, FineGrainedFP8). Any other
quantization packs weights in its own way and is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vlmcore.weights.dtypes import FLOATS, FP8

if TYPE_CHECKING:
    from vlmcore.weights.safetensors_io import TensorInfo

SUFFIX = "_scale_inv"


@dataclass(frozen=True)
class Scale:
    """The scales of a float8 tensor.

    Attributes:
        key: Their tensor's name.
        info: Where they stand.
        block: Rows and columns that share one.
        dtype: What the tensor is dequantized to.
    """

    key: str
    info: TensorInfo
    block: tuple[int, int]
    dtype: str


def present(
    infos: Mapping[str, TensorInfo], config: Mapping[str, Any], faults: list[str]
) -> dict[str, TensorInfo]:
    """The tensors with float8 ones joined to their scales, which are no tensors of their own.

    Args:
        infos: What the files hold.
        config: HF config; says the block size and the dtype.
        faults: Gets what cannot be dequantized.
    """
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    if method not in (None, "fp8"):
        faults.append(
            f"config.json: quantization_config.quant_method {method!r}, expected fp8 or none; take "
            "the unquantized checkpoint"
        )
        return dict(infos)
    dtype = _dtype(config)
    block = tuple(quantization.get("weight_block_size") or ())
    presented = {}
    for key, info in infos.items():
        base = infos.get(key.removesuffix(SUFFIX))
        if key.endswith(SUFFIX) and base is not None and base.stored == FP8:
            continue
        if info.stored == FP8:
            fault = _fault(key, info, infos.get(key + SUFFIX), block)
            if fault:
                faults.append(fault)
                continue
            scale = Scale(key + SUFFIX, infos[key + SUFFIX], (block[0], block[1]), dtype)
            info = replace(info, scale=scale)
        presented[key] = info
    return presented


def _dtype(config: Mapping[str, Any]) -> str:
    named = [part.get("dtype") or part.get("torch_dtype")
             for part in (config, config.get("text_config") or {})]  # fmt: skip
    return next((name for name in named if name in FLOATS), "bfloat16")


def _fault(
    key: str, info: TensorInfo, scales: TensorInfo | None, block: tuple[int, ...]
) -> str | None:
    if scales is None:
        return f"{key}: float8 without {key}{SUFFIX}; take the unquantized checkpoint"
    if len(block) != 2 or len(info.shape) < 2:
        return (
            f"{key}: float8 {info.shape}, but quantization_config.weight_block_size is "
            f"{list(block)}; expected two sizes and a matrix"
        )
    *stack, rows, columns = info.shape
    expected = (*stack, -(-rows // block[0]), -(-columns // block[1]))
    if scales.shape != expected or scales.stored not in FLOATS:
        return (
            f"{key}{SUFFIX}: {scales.stored} {scales.shape}, expected floating point {expected} "
            f"for blocks of {block[0]} × {block[1]}"
        )
    return None
