import copy

import pytest
import torch
from torch import nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLMLP

from vlmcore.models.gated import gate_by_hand, joint_swiglu


@pytest.mark.parametrize("bias", [True, False])
def test_a_towers_gated_layer_gives_what_transformers_does(kernels: str, bias: bool) -> None:
    config = Qwen2_5_VLVisionConfig(hidden_size=24, intermediate_size=40, hidden_act="silu")
    theirs = nn.Sequential(Qwen2_5_VLMLP(config, bias=bias), nn.Tanh())
    ours = copy.deepcopy(theirs)
    gate_by_hand(ours)
    assert not isinstance(ours[0], Qwen2_5_VLMLP)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(2, 9, 24)
    found = []
    for model in (ours, theirs):
        out = model(x)
        found.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
    for one, expected in zip(*found, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-6)


def test_another_activation_is_left_alone() -> None:
    config = Qwen2_5_VLVisionConfig(hidden_size=8, intermediate_size=8, hidden_act="gelu")
    model = nn.Sequential(Qwen2_5_VLMLP(config))
    gate_by_hand(model)
    assert type(model[0]) is Qwen2_5_VLMLP


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_halves_in_one_tensor(kernels: str, dtype: torch.dtype) -> None:
    x = torch.randn(5, 3, 12).to(dtype)
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(joint_swiglu(x), nn.functional.silu(gate) * up)
