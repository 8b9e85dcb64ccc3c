from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from vlmcore.training.gradient_norm import clip, grad_norm


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def parameters(scale: float) -> list[torch.nn.Parameter]:
    torch.manual_seed(3)
    found = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((4, 3), (5,))]
    for parameter in found:
        parameter.grad = scale * torch.randn_like(parameter)
    return found


@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_norm_and_clipping_are_those_of_torch(scale: float) -> None:
    ours, theirs = parameters(scale), parameters(scale)
    grads = [p.grad for p in ours if p.grad is not None]
    norm = grad_norm(grads)
    clip(grads, max_norm=1.0, total_norm=norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    assert norm == pytest.approx(float(expected), rel=1e-6)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_no_gradient_at_all_has_no_norm() -> None:
    assert grad_norm([]) == 0
    clip([], max_norm=1.0, total_norm=5.0)
