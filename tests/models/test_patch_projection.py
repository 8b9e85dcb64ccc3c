import torch
from torch import nn

from vlmcore.models.patch_projection import PatchProjection, project_by_product

KERNEL = (2, 3, 3)


def test_a_product_gives_what_the_convolution_gives() -> None:
    torch.manual_seed(0)
    tower = nn.Sequential(nn.Conv3d(3, 5, KERNEL, stride=KERNEL))
    patches = torch.randn(7, 3, *KERNEL)
    expected = tower(patches)
    expected.square().sum().backward()
    weight = tower[0].weight
    gradient, weight.grad = weight.grad, None
    project_by_product(tower)
    found = tower(patches)
    found.square().sum().backward()
    assert type(tower[0]) is PatchProjection
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(weight.grad, gradient)


def test_a_product_rounds_no_more_than_sums_of_its_length() -> None:
    torch.manual_seed(0)
    kernel = (2, 14, 14)
    tower = nn.Sequential(nn.Conv3d(3, 32, kernel, stride=kernel))
    patches = torch.randn(512, 3, *kernel)
    with torch.no_grad():
        project_by_product(tower)
        multiplied = tower(patches)
        exact = tower.double()(patches.double())
    num_terms = 3 * 2 * 14 * 14  # of values below 4; errors add up as their root
    assert (multiplied - exact).abs().max() < 4 * torch.finfo().eps * num_terms**0.5 / 4


def test_what_slides_over_its_input_stays_a_convolution() -> None:
    tower = nn.Sequential(nn.Conv3d(3, 5, KERNEL, stride=1), nn.Conv3d(5, 2, 2, stride=2))
    images = torch.randn(2, 3, 6, 9, 9)
    expected = tower(images)
    project_by_product(tower)
    assert type(tower[0]) is nn.Conv3d
    torch.testing.assert_close(tower(images), expected)
