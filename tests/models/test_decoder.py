"""The last layer's work on trained tokens alone, on one rank; the step's test holds layouts."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmcore import proc

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
LENGTHS = [9, 4, 12]


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    from vlmcore.layout import Layout
    from vlmcore.training.distributed import model_parallel, process_group

    os.environ |= ALONE | {"MASTER_PORT": str(proc.free_port())}
    with process_group(num_threads=1), model_parallel(Layout(), seed=0):
        yield


def losses_and_gradients(model: Any, labels: torch.Tensor) -> tuple[list[torch.Tensor], list[int]]:
    """What a row gives, and how many tokens two layers of each block saw, behind its attention and
    in its MLP."""
    from vlmcore.models.layers import RowParams

    seen: list[int] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
        for layer in model.decoder.layers
        for module in (layer.self_attention.linear_proj, layer.mlp)
    ]
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).expand(3, 1, -1)
    losses = model(
        torch.randint(0, 20, labels.shape, generator=torch.Generator().manual_seed(1)),
        positions,
        labels=labels,
        packed_seq_params=RowParams(qkv_format="sbhd", cu_seqlens_q=ends, cu_seqlens_kv=ends),
    )
    model.zero_grad()
    (losses * torch.linspace(1, 2, losses.numel())).sum().backward()
    for hook in hooks:
        hook.remove()
    return [losses.detach(), *(p.grad.clone() for p in model.parameters())], seen


@pytest.mark.slow  # it teaches the process to do without CUDA
@pytest.mark.parametrize("recompute", [{}, {
    "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1,
}])  # fmt: skip
def test_the_last_layer_works_for_trained_tokens_alone_and_nothing_changes(
    one_rank: None, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch,
    recompute: dict[str, Any],
) -> None:  # fmt: skip
    from vlmcore.models.build import build_model
    from vlmcore.models.decoder import Decoder
    from vlmcore.models.direct import load_hf_weights

    folder = tiny_model("qwen3")
    (model,) = build_model(folder, **recompute)
    load_hf_weights([model], folder)
    labels = torch.arange(sum(LENGTHS))[None] % 20
    labels[:, ::3] = -100
    trained = int((labels >= 0).sum())
    found, seen = losses_and_gradients(model, labels)
    layers = len(model.decoder.layers)
    assert seen[: 2 * layers] == [25] * (2 * layers - 2) + [trained] * 2
    assert seen.count(trained) == len(seen) / layers  # and again where backward computes it again
    monkeypatch.setattr(Decoder, "_read", lambda *_: None)
    expected, seen = losses_and_gradients(model, labels)
    assert set(seen) == {25}
    for one, other in zip(found, expected, strict=True):
        # sums in another order, which round by the size of their terms
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * float(other.abs().max()))


@pytest.mark.slow
def test_routers_of_experts_count_every_token(
    one_rank: None, tiny_model: Callable[..., Path]
) -> None:
    from vlmcore.models.build import build_model
    from vlmcore.models.direct import load_hf_weights

    folder = tiny_model("qwen3_moe")
    (model,) = build_model(folder)
    load_hf_weights([model], folder)
    labels = torch.full((1, sum(LENGTHS)), -100)
    labels[:, 3] = 1
    _, seen = losses_and_gradients(model, labels)
    assert set(seen) == {25}
