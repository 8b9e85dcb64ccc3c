"""Layers that Megatron-Core leaves to TransformerEngine: RMSNorm, core attention, rotary positions.

They run on CPU and GPU and follow Megatron's constructor signatures (megatron-core 0.16).

Shape suffixes: S tokens of a row, B rows, N query heads, G kv heads, D head dim, P rows of a padded
group, L its length, H hidden, T tokens of the row on all context parallel ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from vlmcore import megatron_cpu
from vlmcore.models.context_parallel import chunks_of, context_parallel_size, whole_row
from vlmcore.models.norm import rms_norm
from vlmcore.models.rotary import turn
from vlmcore.models.varlen_attention import has_varlen_kernel, varlen_attention

MAX_MASKED = 1024  # queries whose mask over their keys is in memory at once
PADDED_PAIRS = 128**2  # of tokens: to attend over so many costs about as much as a call


@dataclass
class RowParams(PackedSeqParams):
    """Where the samples of a row begin, and of which tokens context is asked for.

    Attributes:
        read: Among this rank's [N], ascending; None: all.
    """

    read: Tensor | None = None


class RMSNorm(nn.Module):
    """Root-mean-square norm with Megatron's signature.

    Under sequence parallelism its gradient is summed over the tensor parallel group, which
    Megatron-Core does for parameters marked `sequence_parallel`.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        place = "cpu" if config.use_cpu_initialization else megatron_cpu.device()
        weight = torch.ones(hidden_size, dtype=config.params_dtype, device=place)
        self.weight = nn.Parameter(weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension."""
        return rms_norm(x, self.weight, self.eps)


class PackedAttention(nn.Module):
    """Causal grouped-query attention over rows that hold several samples.

    The row stays [S, B, heads, D] (`qkv_format="sbhd"`), so that rotary positions apply to it
    directly; `cu_seqlens_q` says where each sample begins. Samples of like length are padded
    together and run as one batched causal call: padding sits on the right, where a causal mask
    never looks, so there is no T × T mask and little work in vain. A kernel for samples of any
    length, where there is one, does without padding.

    Context parallel ranks hold the queries of their part of the row and share keys and values.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(
        self,
        query_SBND: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: RowParams | None = None,
    ) -> Tensor:
        """Context [S, B, N · D], of the tokens that are read."""
        if packed_seq_params is None:
            query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_SBGD, value_SBGD))
            context = self._attend(query, key, value).permute(2, 0, 1, 3)
            return context.flatten(2)
        query_SND = query_SBND[:, 0]
        key_TGD, value_TGD = whole_row(key_SBGD)[:, 0], whole_row(value_SBGD)[:, 0]
        row = tuple(packed_seq_params.cu_seqlens_q.tolist()), _own_chunks(len(key_TGD))
        read_N = packed_seq_params.read
        if has_varlen_kernel(query_SND):
            context = self._by_kernel(_starts(*row), query_SND, key_TGD, value_TGD, read_N)
        else:
            context = self._by_groups(_plan(*row), query_SND, key_TGD, value_TGD)
            context = context if read_N is None else context.index_select(0, read_N)
        return context.flatten(1).unsqueeze(1)

    def _by_groups(
        self, plan: _Plan, query_SND: Tensor, key_TGD: Tensor, value_TGD: Tensor
    ) -> Tensor:
        """A call for each group of samples of like length, and for each that began elsewhere."""
        place = query_SND.device
        keys = plan.keys.to(place)
        grouped = zip(
            plan.groups,
            query_SND.index_select(0, plan.queries.to(place)).split(plan.sizes),
            key_TGD.index_select(0, keys).split(plan.sizes),
            value_TGD.index_select(0, keys).split(plan.sizes),
            strict=True,
        )
        contexts = [
            self._attend(*(x.unflatten(0, (len(group), -1)).transpose(1, 2) for x in tensors))
            .transpose(1, 2)
            .flatten(0, 1)
            for group, *tensors in grouped
        ]
        contexts += [
            self._continue(part, query_SND, key_TGD, value_TGD)
            for piece in plan.continued
            for part in piece.parts(MAX_MASKED)
        ]
        return torch.cat(contexts).index_select(0, plan.places.to(place))

    def _by_kernel(
        self,
        starts: _Starts,
        query_SND: Tensor,
        key_TGD: Tensor,
        value_TGD: Tensor,
        read_N: Tensor | None,
    ) -> Tensor:
        place = query_SND.device
        if starts.seen is not None:
            seen = starts.seen.to(place)
            key_TGD, value_TGD = key_TGD.index_select(0, seen), value_TGD.index_select(0, seen)
        scale = query_SND.shape[-1] ** -0.5 if self.scale is None else self.scale
        return varlen_attention(
            query_SND, key_TGD, value_TGD, starts.queries.to(place), starts.keys.to(place),
            longest=starts.longest, scale=scale, causal=True, read_R=read_N,
        )  # fmt: skip

    def _continue(
        self, piece: _Piece, query_SND: Tensor, key_TGD: Tensor, value_TGD: Tensor
    ) -> Tensor:
        """Context of queries whose sample began earlier in the row."""
        queries = slice(piece.query, piece.query + piece.num_queries)
        keys = slice(piece.key, piece.key + piece.num_keys)
        mask = torch.ones(
            piece.num_queries, piece.num_keys, dtype=torch.bool, device=query_SND.device
        ).tril(piece.num_keys - piece.num_queries)
        context = F.scaled_dot_product_attention(
            query_SND[queries].transpose(0, 1)[None],
            key_TGD[keys].transpose(0, 1)[None],
            value_TGD[keys].transpose(0, 1)[None],
            attn_mask=mask,
            scale=self.scale,
            enable_gqa=query_SND.shape[1] != key_TGD.shape[1],
        )
        return context[0].transpose(0, 1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )


@dataclass(frozen=True)
class _Piece:
    """Queries of one sample on this rank, and the keys up to the last of them.

    Attributes:
        query: Place of the first query among this rank's tokens.
        key: Place of the sample's first token in the row.
    """

    query: int
    key: int
    num_queries: int
    num_keys: int

    @property
    def is_whole(self) -> bool:
        """Whether it begins where its sample begins."""
        return self.num_queries == self.num_keys

    def parts(self, size: int) -> Iterator[_Piece]:
        """The same in turn, with so many queries each at most."""
        before = self.num_keys - self.num_queries
        for first in range(0, self.num_queries, size):
            last = min(first + size, self.num_queries)
            yield _Piece(self.query + first, self.key, last - first, before + last)


def _own_chunks(num_tokens: int) -> tuple[tuple[int, int], ...]:
    """What this rank's queries are of a row."""
    size = context_parallel_size()
    if size == 1:
        return ((0, num_tokens),)
    rank = parallel_state.get_context_parallel_rank()
    return chunks_of(num_tokens, rank=rank, size=size)


def _pieces(cu_seqlens: Sequence[int], chunks: Sequence[tuple[int, int]]) -> list[_Piece]:
    """The samples of a row, as far as they lie in these chunks of it."""
    pieces = []
    held = 0
    for begin, end in chunks:
        for first, last in pairwise(cu_seqlens):
            a, b = max(first, begin), min(last, end)
            if a < b:
                pieces.append(_Piece(held + a - begin, first, b - a, b - first))
        held += end - begin
    return pieces


@dataclass(frozen=True)
class _Starts:
    """What a kernel for samples of any length asks of a row; tensors lie on the CPU.

    Attributes:
        queries: First of each piece among this rank's, and the end of the last, int32.
        keys: Likewise, among the `seen` ones.
        longest: Queries of the piece with the most, and keys.
        seen: Places in the row of each piece's keys in turn; None where each is there once.
    """

    queries: Tensor
    keys: Tensor
    longest: tuple[int, int]
    seen: Tensor | None


@lru_cache(maxsize=4)  # a row's layers ask alike
def _starts(cu_seqlens: tuple[int, ...], chunks: tuple[tuple[int, int], ...]) -> _Starts:
    pieces = _pieces(cu_seqlens, chunks)
    lengths = [p.num_queries for p in pieces], [p.num_keys for p in pieces]
    queries, keys = (torch.tensor([0, *of]).cumsum(0).to(torch.int32) for of in lengths)
    parts = [torch.arange(p.key, p.key + p.num_keys) for p in pieces]
    return _Starts(
        queries=queries,
        keys=keys,
        longest=(max(lengths[0]), max(lengths[1])),
        seen=None if all(piece.is_whole for piece in pieces) else torch.cat(parts),
    )


@dataclass(frozen=True)
class _Plan:
    """How the samples of a row attend; indices lie on the CPU.

    Attributes:
        groups: Samples that begin here, those of like length together.
        queries: Their tokens on this rank, each sample padded to its group's longest.
        keys: Likewise, tokens of the row.
        sizes: Padded tokens of each group.
        continued: Samples that began on another rank.
        places: Of each token on this rank, among the padded and then the continued ones.
    """

    groups: list[list[_Piece]]
    queries: Tensor
    keys: Tensor
    sizes: list[int]
    continued: list[_Piece]
    places: Tensor


@lru_cache(maxsize=4)  # a row's layers ask alike
def _plan(cu_seqlens: tuple[int, ...], chunks: tuple[tuple[int, int], ...]) -> _Plan:
    pieces = _pieces(cu_seqlens, chunks)
    continued = [piece for piece in pieces if not piece.is_whole]
    groups = _groups_of_like_length([piece for piece in pieces if piece.is_whole])
    queries, keys, order = [], [], []
    for group in groups:
        steps = torch.arange(group[0].num_queries)
        lengths = torch.tensor([piece.num_queries for piece in group])[:, None]
        first = torch.tensor([(piece.query, piece.key) for piece in group])[:, :, None]
        padded = first + torch.minimum(steps, lengths - 1)[:, None]
        queries.append(padded[:, 0].flatten())
        keys.append(padded[:, 1].flatten())
        order.append(torch.where(steps < lengths, padded[:, 0], -1).flatten())
    order += [torch.arange(p.query, p.query + p.num_queries) for p in continued]
    token = torch.cat(order)
    (real,) = torch.where(token >= 0)
    nothing = [torch.empty(0, dtype=torch.long)]
    return _Plan(
        groups=groups,
        queries=torch.cat(queries or nothing),
        keys=torch.cat(keys or nothing),
        sizes=[len(indices) for indices in queries],
        continued=continued,
        places=torch.empty_like(real).index_copy_(0, token[real], real),
    )


def _groups_of_like_length(pieces: Sequence[_Piece]) -> list[list[_Piece]]:
    """Pieces, the longest of a group first, where padding costs less than a call of their own."""
    groups: list[list[_Piece]] = []
    for piece in sorted(pieces, key=lambda piece: -piece.num_queries):
        if groups and groups[-1][0].num_queries ** 2 - piece.num_queries**2 <= PADDED_PAIRS:
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return groups


def _turn_by_waves(x: Tensor, waves: Tensor, **_: Any) -> Tensor:
    """What Megatron calls for each query and key [S, B, heads, D] with what PositionRotary gave."""
    return turn(x, *waves.to(x.dtype).chunk(2, dim=-1))


rope_utils.fused_apply_rotary_pos_emb = (
    _turn_by_waves  # called by a config with `apply_rope_fusion`
)


class PositionRotary(nn.Module):
    """Waves of explicit (temporal, height, width) positions; stands in for Megatron's.

    Text-only models pass one position three times. `interleaved` spreads the three over the
    frequencies in turn (Qwen3-VL); otherwise each owns a contiguous section (Qwen2.5-VL). `rope` is
    HF's rope_parameters. Source of both layouts: transformers 5.19, modeling_qwen3_vl and
    modeling_qwen2_5_vl.
    """

    def __init__(
        self,
        *,
        kv_channels: int,
        rope: Mapping[str, Any],
        section: Sequence[int],
        interleaved: bool,
    ) -> None:
        super().__init__()
        if sum(section) != kv_channels // 2:
            raise ValueError(
                f"mrope_section {tuple(section)} sums to {sum(section)}, expected "
                f"kv_channels / 2 = {kv_channels // 2}"
            )
        self.inv_freq = _inverse_frequencies(rope, kv_channels)
        self.owner = _frequency_owner(section, interleaved=interleaved)

    def forward(self, position_ids: Tensor, mrope_section: Any = None, **_: Any) -> Tensor:
        """Cosines, then sines of position ids [3, B, S], [S, B, 1, 2 D].

        The section is fixed at construction.
        """
        inv_freq = self.inv_freq.to(position_ids.device)
        angles = position_ids[..., None].float() * inv_freq  # [3, B, S, D / 2]
        owner = self.owner.to(position_ids.device)
        mixed = angles.movedim(0, -1).gather(
            -1, owner.expand(*angles.shape[1:])[..., None]
        )[..., 0]  # fmt: skip
        angles = torch.cat([mixed, mixed], dim=-1).transpose(0, 1)[:, :, None, :]
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _inverse_frequencies(rope: Mapping[str, Any], kv_channels: int) -> Tensor:
    """Radians per position of the D / 2 frequencies, on the CPU; `rope` is HF's rope_parameters."""
    if rope["rope_type"] == "default":
        exponent = torch.arange(0, kv_channels, 2, dtype=torch.float32, device="cpu") / kv_channels
        return 1.0 / rope["rope_theta"] ** exponent
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(rope_parameters=dict(rope), head_dim=kv_channels)
    inv_freq, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    assert factor == 1.0  # else the angles' waves would have to be scaled
    return inv_freq


def _frequency_owner(section: Sequence[int], *, interleaved: bool) -> Tensor:
    """Which position (0 temporal, 1 height, 2 width) drives each of the D / 2 frequencies."""
    if not interleaved:
        return torch.repeat_interleave(torch.arange(3), torch.tensor(list(section)))
    owner = torch.zeros(sum(section), dtype=torch.long)
    for axis in (1, 2):
        owner[axis : section[axis] * 3 : 3] = axis
    return owner
