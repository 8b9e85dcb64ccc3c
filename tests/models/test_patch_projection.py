import pytest
import torch
from torch import Tensor, nn

from vlmcore.models.patch_projection import project_by_product

FRAMES, SIDE, WIDTH = 2, 14, 32
KERNEL = (FRAMES, SIDE, SIDE)


class TinyPatchEmbed(nn.Module):
    """As transformers' towers begin."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, WIDTH, KERNEL, stride=KERNEL)

    def forward(self, hidden_states: Tensor) -> Tensor:
        patches = hidden_states.view(-1, 3, *KERNEL).to(self.proj.weight.dtype)
        return self.proj(patches).view(-1, WIDTH)


@pytest.fixture
def tower() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(TinyPatchEmbed())


def results(tower: nn.Module, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output and the gradients of weight and bias."""
    out = tower(patches)
    probe = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return out, *torch.autograd.grad((out * probe).sum(), list(tower.parameters()))


def test_a_product_gives_what_the_convolution_gives(tower: nn.Module) -> None:
    patches = torch.randn(7, 3 * FRAMES * SIDE**2)
    expected = results(tower, patches)
    project_by_product(tower)
    torch.testing.assert_close(results(tower, patches), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_frame_gives_what_as_many_like_it_give(tower: nn.Module, dtype: torch.dtype) -> None:
    tower.to(dtype)
    frame = torch.randn(7, 3, 1, SIDE**2)
    expected = results(tower, frame.expand(-1, -1, FRAMES, -1).flatten(1))
    project_by_product(tower)
    found = results(tower, frame.flatten(1))
    rounding = 32 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=rounding, atol=rounding)


def test_a_product_rounds_no_more_than_sums_of_its_length(tower: nn.Module) -> None:
    patches = torch.randn(512, 3 * FRAMES * SIDE**2)
    with torch.no_grad():
        project_by_product(tower)
        multiplied = tower(patches)
        exact = tower.double()(patches.double())
    num_terms = patches.shape[1]  # of values below 4; errors add up as their root
    assert (multiplied - exact).abs().max() < 4 * torch.finfo().eps * num_terms**0.5 / 4


def test_what_is_not_given_patches_stays_a_convolution() -> None:
    sliding = nn.Sequential(nn.Conv3d(3, 5, (2, 3, 3)), nn.Conv3d(5, 2, 2, stride=2))
    images = torch.randn(2, 3, 6, 9, 9)
    expected = sliding(images)
    project_by_product(sliding)
    torch.testing.assert_close(sliding(images), expected)
