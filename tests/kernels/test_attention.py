import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmcore.kernels import attention, compiled
from vlmcore.kernels.attention import attend

pytestmark = pytest.mark.skipif(compiled.library() is None, reason="no C++ compiler or AVX-512")


def starts_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def dense(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[list[int], list[int]],
    visible: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """The same in float64, sample by sample with a mask; [S, N, D]."""
    query, key, value = query.double(), key.double(), value.double()
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    contexts = []
    for q, k, v, seen in zip(
        query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]),
        visible.split(lengths[0]), strict=True,
    ):  # fmt: skip
        scores = torch.einsum("snd,tnd->nst", q, k) * scale
        hidden = torch.arange(len(k)) >= seen[:, None]
        contexts.append(
            torch.einsum("nst,tnd->snd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
        )
    return torch.cat(contexts)


def assert_is_exact(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[list[int], list[int]],
    visible: Tensor | None, scale: float,
) -> None:  # fmt: skip
    inputs = query, key, value
    probe = torch.randn(query.shape)
    starts = tuple(map(starts_of, lengths))
    everything = torch.tensor(lengths[1]).repeat_interleave(torch.tensor(lengths[0]))
    found = attend(*inputs, *starts, visible, scale=scale)
    expected = dense(*inputs, lengths, everything if visible is None else visible, scale)
    grads = (torch.autograd.grad(found, inputs, probe),
             torch.autograd.grad(expected, inputs, probe.double()))  # fmt: skip
    for one, other in zip((found, *grads[0]), (expected, *grads[1]), strict=True):
        # fp32 sums of up to 1,200 products; torch's own kernel differs by as much
        torch.testing.assert_close(
            one, other.float(), rtol=0, atol=4e-6 * float(other.detach().abs().max().clamp_min(1))
        )


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=6).filter(any),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    width=st.sampled_from([1, 8, 16, 17, 32, 40, 72, 128]),
    causal=st.booleans(),
    seed=st.integers(0, 99),
)
def test_context_and_gradients_are_those_of_float64(
    lengths: list[int], groups: int, per_group: int, width: int, causal: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    size = sum(lengths)
    query = torch.randn(size, groups * per_group, width, requires_grad=True)
    key, value = (torch.randn(size, groups, width, requires_grad=True) for _ in "kv")
    visible = torch.cat([torch.arange(1, n + 1) for n in lengths]).int() if causal else None
    assert_is_exact(query, key, value, (lengths, lengths), visible, width**-0.5)


@pytest.mark.parametrize("threads", [1, 3])
def test_long_samples_of_which_queries_see_parts(
    monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """Several blocks of keys, strided inputs, scores far apart, and queries of a few keys."""
    monkeypatch.setattr(attention, "FEW_PAIRS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    lengths = [5, 300, 1], [40, 1200, 3]
    both = torch.randn(sum(lengths[1]), 2, 2, 24) * 2
    key, value = (x.requires_grad_() for x in both.unbind(1))
    query = (torch.randn(4, sum(lengths[0]), 24) * 2).transpose(0, 1).requires_grad_()
    visible = torch.cat([
        torch.randint(1, keys + 1, (queries,)) for queries, keys in zip(*lengths, strict=True)
    ]).int()  # fmt: skip
    assert_is_exact(query, key, value, lengths, visible, 0.2)


def test_as_many_threads_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "FEW_PAIRS", 0)
    query, key, value = (torch.randn(90, 4, 32) for _ in "qkv")
    starts = starts_of([30, 60])
    found = []
    for threads in (1, 2, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        found.append(attend(query, key, value, starts, starts, None, scale=1.0))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_number_that_is_none_reaches_the_context(which: int, bad: float) -> None:
    inputs = [torch.randn(20, 2, 16) for _ in "qkv"]
    inputs[which][7, 1, 3] = bad
    context = attend(*inputs, *(starts_of([20]),) * 2, None, scale=1.0)
    assert not context[:, 1].isfinite().all()
    assert context[:, 0].isfinite().all()  # of the other head
