import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmcore.weights.transforms import fuse_qkv, split_qkv

sizes = st.integers(1, 5)


def numbered(*shape: int, start: int = 0) -> torch.Tensor:
    return start + torch.arange(torch.Size(shape).numel()).reshape(shape)


@settings(deadline=None)
@given(groups=sizes, queries=sizes, dim=sizes, rest=st.lists(sizes, max_size=2))
def test_splitting_undoes_fusing(groups: int, queries: int, dim: int, rest: list[int]) -> None:
    q = numbered(groups * queries * dim, *rest)
    k = numbered(groups * dim, *rest, start=10_000)
    v = numbered(groups * dim, *rest, start=20_000)
    geometry = {"num_query_groups": groups, "kv_channels": dim}
    fused = fuse_qkv(q, k, v, **geometry)
    assert fused.shape == (groups * (queries + 2) * dim, *rest)
    for part, whole in zip(split_qkv(fused, **geometry), (q, k, v), strict=True):
        assert torch.equal(part, whole)


@settings(deadline=None)
@given(groups=sizes, queries=sizes, dim=sizes)
def test_a_kv_group_stands_together(groups: int, queries: int, dim: int) -> None:
    """Each group's rows are its query heads, its key head, its value head: ranks cut between."""
    head = torch.arange(groups * queries).repeat_interleave(dim)
    kv = torch.arange(groups).repeat_interleave(dim)
    fused = fuse_qkv(head, 1_000 + kv, 2_000 + kv, num_query_groups=groups, kv_channels=dim)
    for group, rows in enumerate(fused.chunk(groups)):
        heads = [group * queries + i for i in range(queries)]
        expected = [*heads, 1_000 + group, 2_000 + group]
        assert rows.tolist() == [head for head in expected for _ in range(dim)]


def test_fusing_leaves_its_inputs_alone() -> None:
    q, k, v = numbered(8, 3), numbered(4, 3), numbered(4, 3)
    fused = fuse_qkv(q, k, v, num_query_groups=2, kv_channels=2)
    fused += 1
    assert torch.equal(q, numbered(8, 3))
    assert torch.equal(k, numbered(4, 3))
