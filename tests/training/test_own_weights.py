from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.tiny.megatron import stage
from tests.tiny.models import BUILDERS
from vlmcore.families import family_of, read_config
from vlmcore.training.own_weights import OwnWeights, build_hollow, put_in, zeros_lent
from vlmcore.training.transformers_model import load

BF16 = stage(engine="transformers", torch_dtype="bfloat16", fsdp="fsdp2")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", BUILDERS)
def test_a_hollow_model_that_is_filled_is_the_loaded_one(
    tiny_model: Callable[..., Path], name: str, tied: bool
) -> None:
    folder = tiny_model(name, tied=tied)
    family = family_of(read_config(folder))
    loaded, hollow = load(BF16, folder, family), build_hollow(BF16, folder, family)
    assert all(weight.is_meta for weight in hollow.parameters())
    own = OwnWeights(folder, torch.bfloat16)
    for key, weight in hollow.named_parameters():
        values = torch.empty_like(weight, device="cpu")
        own.fill(key, values)
        put_in(weight, values)
    expected, found = loaded.state_dict(), hollow.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], weight) for key, weight in expected.items())
    assert len(list(hollow.parameters())) == len(list(loaded.parameters()))  # tied ones once
    buffers = dict(hollow.named_buffers())
    for key, buffer in loaded.named_buffers():
        assert buffers.pop(key).equal(buffer), key
    assert not buffers


def test_lent_zeros_are_given_back(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("qwen3")
    hollow = build_hollow(BF16, folder, family_of(read_config(folder)))
    weights = list(hollow.parameters())
    weights[1].requires_grad_(False)
    with zeros_lent(weights):
        assert not any(weight.is_meta for weight in hollow.parameters())
        loss = hollow(torch.tensor([[3, 7, 5]])).logits.sum()
        assert not any(weight.requires_grad for weight in weights[1:2])
        loss.backward()
    assert all(ours is theirs for ours, theirs in zip(weights, hollow.parameters(), strict=True))
    assert all(weight.is_meta and weight.grad is None for weight in weights)
    assert not weights[1].requires_grad
    assert weights[0].requires_grad
