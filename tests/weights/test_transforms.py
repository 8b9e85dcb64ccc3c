import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmcore.weights.transforms import (
    Copy,
    InterleaveQKV,
    Transform,
    Transpose,
    fuse_qkv,
    split_qkv,
)

sizes = st.integers(1, 5)


def numbered(*shape: int, start: int = 0) -> torch.Tensor:
    return start + torch.arange(torch.Size(shape).numel()).reshape(shape)


@settings(deadline=None)
@given(groups=sizes, queries=sizes, dim=sizes, rest=st.lists(sizes, max_size=2))
def test_splitting_undoes_fusing(groups: int, queries: int, dim: int, rest: list[int]) -> None:
    q = numbered(groups * queries * dim, *rest)
    k = numbered(groups * dim, *rest, start=10_000)
    v = numbered(groups * dim, *rest, start=20_000)
    fused = fuse_qkv(q, k, v, num_query_groups=groups)
    assert fused.shape == (groups * (queries + 2) * dim, *rest)
    parts = split_qkv(fused, num_query_groups=groups, kv_channels=dim)
    for part, whole in zip(parts, (q, k, v), strict=True):
        assert torch.equal(part, whole)


@settings(deadline=None)
@given(groups=sizes, queries=sizes, dim=sizes)
def test_a_kv_group_stands_together(groups: int, queries: int, dim: int) -> None:
    """Each group's rows are its query heads, its key head, its value head: ranks cut between."""
    head = torch.arange(groups * queries).repeat_interleave(dim)
    kv = torch.arange(groups).repeat_interleave(dim)
    fused = fuse_qkv(head, 1_000 + kv, 2_000 + kv, num_query_groups=groups)
    for group, rows in enumerate(fused.chunk(groups)):
        heads = [group * queries + i for i in range(queries)]
        expected = [*heads, 1_000 + group, 2_000 + group]
        assert rows.tolist() == [head for head in expected for _ in range(dim)]


def test_fusing_leaves_its_inputs_alone() -> None:
    q, k, v = numbered(8, 3), numbered(4, 3), numbered(4, 3)
    fused = fuse_qkv(q, k, v, num_query_groups=2)
    fused += 1
    assert torch.equal(q, numbered(8, 3))
    assert torch.equal(k, numbered(4, 3))


transforms = st.one_of(
    st.just(Copy()),
    st.just(Transpose()),
    st.builds(InterleaveQKV, num_query_groups=sizes, kv_channels=sizes),
)


@settings(deadline=None)
@given(transform=transforms, queries=sizes, rows=sizes, columns=sizes)
def test_every_transform_is_undone_and_numpy_gives_what_torch_gives(
    transform: Transform, queries: int, rows: int, columns: int
) -> None:
    if isinstance(transform, InterleaveQKV):
        kv = transform.num_query_groups * transform.kv_channels
        shapes = [(kv * queries, columns), (kv, columns), (kv, columns)]
    else:
        shapes = [(rows, columns)]
    pieces = [numbered(*shape, start=10_000 * i) for i, shape in enumerate(shapes)]
    there = transform.to_mcore(*pieces)
    for back, piece in zip(transform.to_hf(there), pieces, strict=True):
        assert torch.equal(back, piece)
    arrays = [piece.numpy() for piece in pieces]
    assert np.array_equal(transform.to_mcore(*arrays), there.numpy())
    for back, array in zip(transform.to_hf(there.numpy()), arrays, strict=True):
        assert np.array_equal(back, array)
