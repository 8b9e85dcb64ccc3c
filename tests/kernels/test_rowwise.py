import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmcore.kernels import compiled, rowwise
from vlmcore.models.rotary import turn

pytestmark = pytest.mark.skipif(compiled.library() is None, reason="no C++ compiler or AVX-512")


@pytest.fixture(autouse=True, params=[1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rowwise, "FEW_NUMBERS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


def assert_alike(found: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """Values and gradients, the expected ones in float64."""
    probe = torch.randn(found.shape)
    pairs = zip(
        (found, *torch.autograd.grad(found, inputs, probe)),
        (expected, *torch.autograd.grad(expected, inputs, probe.double())),
        strict=True,
    )
    for one, other in pairs:
        assert one.shape == other.shape
        largest = float(other.detach().abs().max().clamp_min(1))
        torch.testing.assert_close(one, other.float(), rtol=2e-6, atol=2e-6 * largest)


@pytest.mark.parametrize("width", [5, 16, 100])
@pytest.mark.parametrize("rows", [(1,), (3, 7), (40,)])
def test_the_norm_is_that_of_float64(rows: tuple[int, ...], width: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(*rows, width, requires_grad=True)
    weight = torch.rand(width).add_(0.5).requires_grad_()
    expected = F.rms_norm(x.double(), (width,), weight.double(), eps=1e-6)
    assert_alike(rowwise.rms_norm(x, weight, 1e-6), expected, (x, weight))


def test_a_norm_gives_only_the_gradients_asked_for() -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.rand(8, requires_grad=True)
    for frozen, trained in ((x.detach(), weight), (x, weight.detach())):
        inputs = [one for one in (frozen, trained) if one.requires_grad]
        (grad,) = torch.autograd.grad(rowwise.rms_norm(frozen, trained, 1e-6).sum(), inputs)
        assert grad.isfinite().all()


@pytest.mark.parametrize("width", [1, 5, 48])
def test_gated_units_are_those_of_float64(width: int) -> None:
    torch.manual_seed(0)
    x = (torch.randn(4, 9, 2 * width) * 30).requires_grad_()  # where e^x ends, too
    gate, up = x.double().chunk(2, dim=-1)
    expected = F.silu(gate) * up
    probe = torch.randn(expected.shape)
    (wanted,) = torch.autograd.grad(expected, x, probe.double(), retain_graph=True)
    apart = tuple(part.detach().requires_grad_() for part in x.chunk(2, dim=-1))
    for found, inputs in ((rowwise.joint_swiglu(x), (x,)), (rowwise.swiglu(*apart), apart)):
        torch.testing.assert_close(found, expected.float(), rtol=2e-6, atol=2e-6)
        grads = torch.cat(torch.autograd.grad(found, inputs, probe), dim=-1)
        torch.testing.assert_close(grads, wanted, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("width", [2, 10, 64])
@pytest.mark.parametrize("form", ["plain", "heads first", "part"])
def test_pairs_turn_by_their_tokens_angle(form: str, width: int) -> None:
    torch.manual_seed(0)
    if form == "heads first":
        x = torch.randn(3, 11, width).transpose(0, 1)
    else:
        x = (
            torch.randn(11, 3, width)
            if form == "plain"
            else torch.randn(11, 5, width + 1)[:, 1:4, 1:]
        )
    x.requires_grad_()
    angles = torch.randn(11, width // 2).repeat(1, 2)
    both = torch.stack([angles.cos(), angles.sin()], dim=1)  # a row of each, in turn
    a, b = x.double().chunk(2, dim=-1)
    cos, sin = (wave[:, None].double() for wave in both.unbind(1))
    expected = x.double() * cos + torch.cat([-b, a], dim=-1) * sin
    assert_alike(turn(x, *both[:, :, None].unbind(1)), expected, (x,))
