import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmcore.kernels import compiled, matrix_products
from vlmcore.kernels.matrix_products import fast_products

SIZES = st.integers(1, 70)


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where MKL is as good, and for small matrices too."""
    monkeypatch.setattr(matrix_products, "_onednn_is_faster", torch.backends.mkldnn.is_available)
    monkeypatch.setattr(matrix_products, "SMALL", 0)


def matrix(rows: int, columns: int, form: str) -> Tensor:
    if form == "columns first":
        return torch.randn(columns, rows).t()
    if form == "part":
        return torch.randn(rows + 2, columns + 3)[1:-1, 2:-1]
    if form == "one row":
        return torch.randn(1, columns).expand(rows, -1)
    if form == "strided":
        return torch.randn(rows, 2 * columns)[:, ::2]
    return torch.randn(rows, columns)


FORMS = st.sampled_from(["plain", "columns first", "part", "one row", "strided"])


@settings(deadline=None, max_examples=200)
@given(m=SIZES, k=SIZES, n=SIZES, form_a=FORMS, form_b=FORMS)
def test_products_are_those_of_float64(m: int, k: int, n: int, form_a: str, form_b: str) -> None:
    a, b, bias = matrix(m, k, form_a), matrix(k, n, form_b), torch.randn(n)
    with fast_products():
        found, biased, scaled = a @ b, torch.addmm(bias, a, b), torch.addmm(bias, a, b, alpha=0.5)
    exact = a.double() @ b.double()
    for out, expected in ((found, exact), (biased, bias + exact), (scaled, bias + exact / 2)):
        assert out.is_contiguous()
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.skipif(compiled.library() is None, reason="no C++ compiler or AVX-512")
@settings(deadline=None, max_examples=100)
@given(
    height=SIZES,
    count=st.one_of(SIZES, st.integers(250, 600)),
    width=st.integers(1, 150),
    threads=st.sampled_from([1, 3]),
)
def test_gradients_of_weights_are_those_of_float64(
    height: int, count: int, width: int, threads: int
) -> None:
    grad, x = torch.randn(count, height), torch.randn(count, width)
    exact = grad.double().t() @ x.double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        patch.setattr(matrix_products, "FEW", 0)
        assert matrix_products._is_of_columns(grad.t(), x)
        with fast_products():
            found = grad.t() @ x
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=5e-5)


def test_backward_and_other_dtypes_go_the_same_way() -> None:
    x = torch.randn(40, 30, requires_grad=True)
    layer = torch.nn.Linear(30, 20)
    grad = torch.randn(40, 20)
    with fast_products():
        found = torch.autograd.grad(layer(x), [x, *layer.parameters()], grad)
        whole = torch.arange(6).view(2, 3) @ torch.arange(6).view(3, 2)
        half = torch.ones(8, 8, dtype=torch.bfloat16) @ torch.ones(8, 8, dtype=torch.bfloat16)
        nothing = torch.ones(0, 3) @ torch.ones(3, 2)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            torch.ones(2, 3) @ torch.ones(2, 3)
    expected = (grad @ layer.weight, grad.t() @ x, grad.sum(0))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert whole.tolist() == [[10, 13], [28, 40]]
    assert half[0, 0] == 8
    assert nothing.shape == (0, 2)


def test_outside_torch_multiplies_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, onednn = [], matrix_products._by_onednn
    monkeypatch.setattr(matrix_products, "_by_onednn", lambda *a: calls.append(1) or onednn(*a))
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    with fast_products():
        a @ b
    assert len(calls) == 1
    a @ b
    assert len(calls) == 1
