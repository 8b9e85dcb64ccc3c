"""Megatron's modules without process groups; nothing here is taught to run without CUDA."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmcore.models import layers
from vlmcore.models.layers import PackedAttention, PositionRotary, RowParams

HEADS, GROUPS, DIM = 4, 2, 8
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def packed(lengths: list[int]) -> RowParams:
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return RowParams(qkv_format="sbhd", cu_seqlens_q=ends, cu_seqlens_kv=ends)


def qkv(num_tokens: int, *, rows: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    return tuple(
        torch.randn(
            num_tokens, rows, heads, DIM, generator=generator, dtype=torch.float64
        ).requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    )


def dense(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float) -> Tensor:
    """The same through a T × T block-diagonal causal mask; [S, 1, heads · D]."""
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (sample[:, None] == sample) & torch.ones(len(sample), len(sample)).tril().bool()
    key, value = (x.repeat_interleave(HEADS // GROUPS, dim=2) for x in (key, value))
    scores = torch.einsum("sbnd,tbnd->bnst", query, key) * scale
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("bnst,tbnd->sbnd", weights, value).flatten(2)


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(
        st.one_of(st.integers(1, 20), st.sampled_from([1, 2, 4, 8, 16])), min_size=1, max_size=7
    ),
    scale=st.sampled_from([None, 0.3]),
)
def test_packed_attention_equals_a_block_diagonal_mask(
    lengths: list[int], scale: float | None
) -> None:
    attention = PackedAttention(None, 1, None, "self", softmax_scale=scale)
    inputs = qkv(sum(lengths))
    probe = torch.linspace(-1, 1, sum(lengths) * HEADS * DIM, dtype=torch.float64)
    results = []
    for out in (
        attention(*inputs, packed_seq_params=packed(lengths)),
        dense(*inputs, lengths, scale or DIM**-0.5),
    ):
        grads = torch.autograd.grad((out.flatten() * probe).sum(), inputs)
        results.append((out, *grads))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("max_masked", [2, 1024])
def test_parts_of_a_row_attend_to_what_came_before_them(
    monkeypatch: pytest.MonkeyPatch, max_masked: int
) -> None:
    """As on a context parallel rank that holds the first and the last of four chunks."""
    monkeypatch.setattr(layers, "MAX_MASKED", max_masked)
    monkeypatch.setattr(layers, "_own_chunks", lambda _: ((0, 6), (18, 24)))
    query, key, value = qkv(24)
    own = torch.cat([query[:6], query[18:]])
    found = PackedAttention(None, 1, None, "self")(
        own, key, value, packed_seq_params=packed([3, 18, 3])
    )
    expected = dense(query, key, value, [3, 18, 3], DIM**-0.5)
    torch.testing.assert_close(found, torch.cat([expected[:6], expected[18:]]))


@pytest.mark.parametrize("chunks", [((0, 24),), ((0, 6), (18, 24))])
def test_context_of_some_tokens_alone_is_theirs(
    kernels: str, monkeypatch: pytest.MonkeyPatch, chunks: tuple[tuple[int, int], ...]
) -> None:
    monkeypatch.setattr(layers, "_own_chunks", lambda _: chunks)
    query, key, value = (x.detach().float().requires_grad_() for x in qkv(24))
    own = torch.cat([query[a:b] for a, b in chunks])
    params, attention = packed([3, 18, 3]), PackedAttention(None, 1, None, "self")
    read = torch.tensor([4, 5, 9, 11])
    expected = attention(own, key, value, packed_seq_params=params)[read]
    params.read = read
    found = attention(own, key, value, packed_seq_params=params)
    probe = torch.linspace(-1, 1, found.numel()).view(found.shape)
    grads = [torch.autograd.grad((x * probe).sum(), (query, key, value)) for x in (found, expected)]
    torch.testing.assert_close([found, *grads[0]], [expected, *grads[1]], rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("chunks", [((0, 300),), ((0, 75), (225, 300))])
def test_the_kernel_on_a_gpu_equals_a_block_diagonal_mask(
    monkeypatch: pytest.MonkeyPatch, chunks: tuple[tuple[int, int], ...]
) -> None:
    monkeypatch.setattr(layers, "_own_chunks", lambda _: chunks)
    lengths = [1, 130, 60, 109]
    query, key, value = (x.detach().to("cuda", torch.bfloat16) for x in qkv(300))
    query, key, value = (F.pad(x, (0, 64 - DIM)).requires_grad_() for x in (query, key, value))
    own = torch.cat([query[a:b] for a, b in chunks])
    params = packed(lengths)
    params.cu_seqlens_q = params.cu_seqlens_q.cuda()
    found = PackedAttention(None, 1, None, "self", softmax_scale=0.3)(
        own, key, value, packed_seq_params=params
    )
    wide = (x.double().cpu() for x in (query, key, value))
    expected = dense(*wide, lengths, 0.3)
    expected = torch.cat([expected[a:b] for a, b in chunks])
    # 8 bits of mantissa in what goes in and comes out
    torch.testing.assert_close(found.double().cpu(), expected, rtol=2e-2, atol=2e-2)


def test_a_sample_of_no_tokens_changes_nothing() -> None:
    attention = PackedAttention(None, 1, None, "self")
    inputs = qkv(9)
    with_empty = attention(*inputs, packed_seq_params=packed([4, 0, 5, 0]))
    assert torch.equal(with_empty, attention(*inputs, packed_seq_params=packed([4, 5])))


def test_rows_without_packing_are_causal_one_by_one() -> None:
    attention = PackedAttention(None, 1, None, "self")
    query, key, value = qkv(6, rows=2)
    out = attention(query, key, value)
    for row in range(2):
        alone = [x[:, row : row + 1] for x in (query, key, value)]
        torch.testing.assert_close(out[:, row : row + 1], dense(*alone, [6], DIM**-0.5))


def rotary_of_qwen3_vl(section: list[int], dim: int) -> torch.nn.Module:
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

    return Qwen3VLTextRotaryEmbedding(Qwen3VLTextConfig(**text_config(section, dim)))


def rotary_of_qwen2_5_vl(section: list[int], dim: int) -> torch.nn.Module:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding

    return Qwen2_5_VLRotaryEmbedding(Qwen2_5_VLTextConfig(**text_config(section, dim)))


def text_config(section: list[int], dim: int) -> dict:
    rope = {"rope_type": "default", "rope_theta": 12_345.0, "mrope_section": section}
    return {
        "hidden_size": 2 * dim,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": dim,
        "rope_parameters": rope,
    }


@pytest.mark.parametrize(
    ("section", "interleaved"),
    [([24, 20, 20], True), ([4, 2, 2], True), ([16, 24, 24], False), ([6, 5, 5], False)],
)
def test_rotary_waves_equal_transformers(section: list[int], interleaved: bool) -> None:
    dim, rows, num_tokens = 2 * sum(section), 2, 33
    positions = torch.randint(
        0, 500, (3, rows, num_tokens), generator=torch.Generator().manual_seed(dim)
    )
    ours = PositionRotary(
        kv_channels=dim,
        rope={"rope_type": "default", "rope_theta": 12_345.0},
        section=section,
        interleaved=interleaved,
    )
    found = ours(positions)[:, :, 0].transpose(0, 1).chunk(2, dim=-1)  # [B, S, D] each
    x = torch.zeros(rows, num_tokens, dim)
    if interleaved:
        cos, sin = rotary_of_qwen3_vl(section, dim)(x, positions)
    else:
        cos, sin = (
            chunked(wave, section) for wave in rotary_of_qwen2_5_vl(section, dim)(x, positions)
        )
    for wave, expected in zip(found, (cos, sin), strict=True):
        torch.testing.assert_close(wave, expected, rtol=0, atol=1e-6)


def chunked(waves_3BSD: Tensor, section: list[int]) -> Tensor:
    """Qwen2.5-VL's choice among the three positions' waves, unless the library has made it."""
    if waves_3BSD.ndim == 3:
        return waves_3BSD
    parts = waves_3BSD.split(section * 2, dim=-1)
    return torch.cat([part[i % 3] for i, part in enumerate(parts)], dim=-1)


def test_text_positions_are_plain_rotary() -> None:
    rope = {"rope_type": "default", "rope_theta": 100.0}
    ours = PositionRotary(kv_channels=8, rope=rope, section=(4, 0, 0), interleaved=False)
    cos, sin = ours(torch.arange(5).expand(3, 1, -1))[:, 0, 0].chunk(2, dim=-1)
    angles = torch.arange(5)[:, None] * 100.0 ** (-torch.arange(4) / 4)
    torch.testing.assert_close(cos, angles.cos().repeat(1, 2))
    torch.testing.assert_close(sin, angles.sin().repeat(1, 2))


def test_llama3_frequencies_equal_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    fields = {"hidden_size": 128, "num_attention_heads": 2, "head_dim": 64}
    theirs = LlamaRotaryEmbedding(LlamaConfig(rope_parameters=LLAMA3, **fields))
    ours = PositionRotary(kv_channels=64, rope=LLAMA3, section=(32, 0, 0), interleaved=False)
    assert torch.equal(ours.inv_freq, theirs.inv_freq)
    plain = PositionRotary(
        kv_channels=64,
        rope={"rope_type": "default", "rope_theta": LLAMA3["rope_theta"]},
        section=(32, 0, 0),
        interleaved=False,
    )
    ratio = ours.inv_freq / plain.inv_freq
    assert ratio[0] == 1  # short waves stay
    assert torch.isclose(ratio[-1], torch.tensor(1 / 8))  # long ones are stretched
    assert ((ratio > 0.13) & (ratio < 0.99)).any()  # in between


def test_a_section_that_does_not_fill_the_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 2, 2\) sums to 8, expected kv_channels / 2 = 16"):
        PositionRotary(kv_channels=32, rope=LLAMA3, section=(4, 2, 2), interleaved=True)
