"""Matrix products in fp32 on a CPU, by whichever library is the fastest there.

Torch calls MKL, which (2024.2) gives other processors than Intel's its 256-bit code; oneDNN, which
torch holds too, takes half the time on an AMD EPYC with AVX-512, and `matrix_products.cpp` two
thirds of that for the gradient of a weight (`benchmarks/cpu_kernels.py`). It ends when torch or MKL
chooses better.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from vlmcore.kernels.compiled import function, serves

SMALL = 1_500_000  # multiplications; below, finding oneDNN's kernel takes longer than MKL's product
LARGE = 2**18  # numbers of a result; above, oneDNN's takes no longer than ours
FEW = 50_000_000  # multiplications; threads take longer to start than they save

_by_onednn = torch.ops.mkldnn._linear_pointwise


@contextmanager
def fast_products() -> Iterator[None]:
    """Inside, products of fp32 matrices on this process's CPU take the faster library."""
    if not _onednn_is_faster():
        yield
        return
    with torch.library._scoped_library("aten", "IMPL") as library:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel is replaced, which is the purpose
            library.impl("mm", _mm, "CPU", allow_override=True)
            library.impl("addmm", _addmm, "CPU", allow_override=True)
        yield


def _onednn_is_faster() -> bool:
    info = Path("/proc/cpuinfo")
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()
        and info.exists()
        and "GenuineIntel" not in info.read_text()
    )


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if _is_of_columns(a, b):
        return _transposed_product(a.t(), b)
    if _suits(a, b):
        return _product(a, b, None)
    return torch.mm(a, b, out=a.new_empty(len(a), b.shape[1]))  # goes by a kernel of its own


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if _suits(a, b) and bias.ndim == 1 and beta == alpha == 1:
        return _product(a, b, bias)
    out = a.new_empty(len(a), b.shape[1])
    return torch.addmm(bias, a, b, beta=beta, alpha=alpha, out=out)


def _suits(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype is b.dtype is torch.float32
        and a.shape[1] == b.shape[0]
        and len(a) * a.shape[1] * b.shape[1] >= SMALL
        and 1 in a.stride()
        and 1 in b.stride()
    )


def _is_of_columns(a: Tensor, b: Tensor) -> bool:
    """Whether `a` comes columns first, as for a weight's gradient, and our product takes both."""
    (height, count), width = a.shape, b.shape[1]
    return (
        a.stride() == (1, height)
        and count == len(b)
        and b.is_contiguous()
        and 0 < height * width <= LARGE
        and serves(a, b)
    )


def _transposed_product(left: Tensor, right: Tensor) -> Tensor:
    """The transpose of `left` [S, H] times `right` [S, W], [H, W]."""
    (count, height), width = left.shape, right.shape[1]
    out = left.new_empty(height, width)
    function("transposed_product", c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64, c_int64,
             c_void_p, c_int)(
        left.data_ptr(), height, right.data_ptr(), width, count, height, width, out.data_ptr(),
        1 if count * height * width < FEW else torch.get_num_threads(),
    )  # fmt: skip
    return out


def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """Where `a` comes columns first, as for a weight's gradient, the smaller of both is turned."""
    if bias is None and a.stride(1) != 1 and b.numel() < a.numel():
        turned: Tensor = _by_onednn(b.t(), a, None, "none", [], "")
        return turned.t().contiguous()
    out: Tensor = _by_onednn(a, b.t(), bias, "none", [], "")
    return out
