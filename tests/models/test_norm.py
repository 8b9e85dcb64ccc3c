import pytest
import torch
from torch import nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from vlmcore.models.norm import norm_by_hand, rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 16), (2, 3, 5, 16)])
def test_values_and_gradients_are_those_of_transformers(
    kernels: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    theirs = Qwen2RMSNorm(16, eps=1e-5).to(dtype)
    nn.init.uniform_(theirs.weight, 0.5, 1.5)
    x, probe = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)
    inputs = (x, theirs.weight)
    expected = theirs(x)
    found = rms_norm(x, theirs.weight, 1e-5)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.03, "atol": 0.03}
    if kernels == "own":  # adds the squares up in another order
        torch.testing.assert_close(found, expected, **close)
    else:
        assert torch.equal(found, expected)
    grads = (torch.autograd.grad(out, inputs, probe) for out in (found, expected))
    for one, other in zip(*grads, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, **close)


def test_a_frozen_weight_costs_nothing() -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.rand(8)
    (grad,) = torch.autograd.grad(rms_norm(x, weight, 1e-6).sum(), x)
    assert grad.shape == x.shape


def test_norms_of_a_transformers_model_keep_their_weights(kernels: str) -> None:
    model = nn.Sequential(Qwen2RMSNorm(16, eps=1e-5), nn.LayerNorm(16))
    x, before = torch.randn(4, 16), list(model.state_dict().items())
    expected = model(x)
    norm_by_hand(model)
    assert not isinstance(model[0], Qwen2RMSNorm)
    assert type(model[1]) is nn.LayerNorm
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    assert [name for name, _ in before] == list(model.state_dict())
