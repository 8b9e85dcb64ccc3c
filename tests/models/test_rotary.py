import importlib.util

import pytest
import torch
from torch import Tensor, nn

from vlmcore.models.rotary import turn, turn_by_hand


def waves(num_tokens: int, width: int) -> tuple[Tensor, Tensor]:
    angles = torch.randn(num_tokens, width // 2).repeat(1, 2)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "exaone4_5"])
def test_a_towers_queries_and_keys_turn_as_in_transformers(kernels: str, family: str) -> None:
    name = f"transformers.models.{family}.modeling_{family}"
    changed = importlib.import_module(name)
    turn_by_hand(type("Part", (nn.Module,), {"__module__": name})())
    spec = importlib.util.find_spec(name)
    unchanged = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unchanged)
    theirs = unchanged.apply_rotary_pos_emb_vision
    assert changed.apply_rotary_pos_emb_vision.__module__ == turn_by_hand.__module__
    assert theirs.__module__ == name
    torch.manual_seed(0)
    inputs = [torch.randn(7, 3, 8, requires_grad=True) for _ in "qk"]
    probe = torch.randn(7, 3, 8)
    cos_sin = waves(7, 8)
    results = []
    for function in (changed.apply_rotary_pos_emb_vision, theirs):
        query, key = function(*inputs, *cos_sin)
        grads = torch.autograd.grad(((query + 2 * key) * probe).sum(), inputs)
        results.append((query, key, *grads))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_turning_keeps_dtype_and_length() -> None:
    x = torch.randn(5, 1, 2, 8, dtype=torch.float64)
    cos, sin = (wave[:, None, None].double() for wave in waves(5, 8))
    assert turn(x, cos, sin).dtype == torch.float64
    torch.testing.assert_close(turn(x, cos, sin).norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turn(turn(x, cos, sin), cos, -sin), x)
