"""Our kernels for a CPU in fp32 beside torch's operations for the same: forward and backward.

    python benchmarks/cpu_kernels.py [--repeats N] [--json]

One thread, the best of the repeats of each, in turn. Torch attends over samples of a packed row one
after the other, over images or samples of one length in a single call.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmcore.kernels import rowwise
from vlmcore.kernels.attention import attend
from vlmcore.kernels.compiled import library
from vlmcore.kernels.matrix_products import fast_products
from vlmcore.models.rotary import turn

TOKENS = 3072
ATTENTION = {  # lengths, query heads, key heads, head dim, causal
    "tower, 1 image of 1024 patches": ([1024], 16, 16, 80, False),
    "tower, 48 windows of 64 patches": ([64] * 48, 16, 16, 80, False),
    "decoder, 1 sample of 4096": ([4096], 16, 8, 128, True),
    "decoder, 3072 tokens of 60 to 1400": ([1400, 800, 400, 250, 162, 60], 16, 8, 128, True),
    "tiny tower, 1 image of 1024 patches": ([1024], 4, 4, 16, False),
    "tiny tower, 80 windows of 64 patches": ([64] * 80, 4, 4, 16, False),
    "tiny decoder, 3072 tokens of 60 to 1400": ([1400, 800, 400, 250, 162, 60], 4, 2, 32, True),
    "tiny decoder, 8 samples of 75": ([75] * 8, 4, 2, 32, True),
}
LINEAR = ((1024, 1024), (128, 256))
Case = tuple[Callable[[], Tensor], Callable[[], Tensor], tuple[Tensor, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="of each; the best counts")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    if library() is None:
        sys.exit("no kernels here: they need a C++ compiler and a processor with AVX-512")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    figures = {name: measure(*case, given.repeats) for name, case in cases().items()}
    figures |= products(given.repeats)
    if given.json:
        sys.stdout.write(json.dumps(figures) + "\n")
        return
    for name, (torchs, ours, ratio) in figures.items():
        sys.stdout.write(
            f"{name:50s} torch {torchs:8.2f} ms   ours {ours:8.2f} ms   {ratio:.2f} x\n"
        )


def cases() -> dict[str, Case]:
    found = {f"attention, {name}": attention(*case) for name, case in ATTENTION.items()}
    x, weight = leaf(TOKENS, 2048), leaf(2048)
    found["RMSNorm, 2048 wide"] = (
        lambda: weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        lambda: rowwise.rms_norm(x, weight, 1e-6),
        (x, weight),
    )
    joint = leaf(TOKENS, 2 * 2048)
    found["SwiGLU, 2048 wide"] = (
        lambda: F.silu(joint.chunk(2, dim=-1)[0]) * joint.chunk(2, dim=-1)[1],
        lambda: rowwise.joint_swiglu(joint),
        (joint,),
    )
    heads, angles = leaf(TOKENS, 16, 128), torch.randn(TOKENS, 64).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()

    def turned() -> Tensor:
        left, right = heads.chunk(2, dim=-1)
        return heads * cos[:, None] + torch.cat([-right, left], dim=-1) * sin[:, None]

    found["rotary positions, 16 heads of 128"] = (
        turned, lambda: turn(heads, cos[:, None], sin[:, None]), (heads,)
    )  # fmt: skip
    return found


def attention(lengths: list[int], heads: int, groups: int, width: int, causal: bool) -> Case:
    size = sum(lengths)
    query, key, value = (leaf(size, n, width) for n in (heads, groups, groups))
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    visible = torch.cat([torch.arange(1, n + 1) for n in lengths]).int() if causal else None
    alike = len(set(lengths)) == 1

    def torchs() -> Tensor:
        parts = zip(
            *((x.unflatten(0, (len(lengths), -1)),) if alike else x[:, None].split(lengths)
              for x in (query, key, value)),
            strict=True,
        )  # fmt: skip
        return torch.cat([
            F.scaled_dot_product_attention(
                *(x.transpose(1, 2) if alike else x.permute(1, 2, 0, 3) for x in part),
                is_causal=causal, enable_gqa=heads != groups,
            ).transpose(1, 2).flatten(0, 1)
            for part in parts
        ])  # fmt: skip

    def ours() -> Tensor:
        return attend(query, key, value, starts, starts, visible, scale=width**-0.5)

    return torchs, ours, (query, key, value)


def products(repeats: int) -> dict[str, tuple[float, float, float]]:
    """Linear layers: with torch's choice of library, and with ours."""
    found = {}
    for width, height in LINEAR:
        x, weight = leaf(TOKENS, width), leaf(height, width)
        case = functools.partial(F.linear, x, weight), (x, weight), repeats
        theirs = best_ms(*case)
        with fast_products():
            found[f"linear layer, {width} x {height}"] = rounded(theirs, best_ms(*case))
    return found


def measure(
    torchs: Callable[[], Tensor], ours: Callable[[], Tensor], inputs: tuple[Tensor, ...],
    repeats: int,
) -> tuple[float, float, float]:  # fmt: skip
    torch.testing.assert_close(ours(), torchs(), rtol=1e-4, atol=1e-4)
    return rounded(*(best_ms(one, inputs, repeats) for one in (torchs, ours)))


def best_ms(compute: Callable[[], Tensor], inputs: tuple[Tensor, ...], repeats: int) -> float:
    probe, took = torch.randn_like(compute()), []
    for _ in range(repeats + 1):  # the first warms up
        began = time.perf_counter()
        torch.autograd.grad(compute(), inputs, probe)
        took.append(time.perf_counter() - began)
    return 1000 * min(took[1:])


def rounded(theirs: float, mine: float) -> tuple[float, float, float]:
    return round(theirs, 2), round(mine, 2), round(theirs / mine, 2)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


if __name__ == "__main__":
    main()
