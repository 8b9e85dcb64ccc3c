import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmcore.dataloading.packing import pack_by_length

MAX_LENGTH = 100
lengths = st.lists(st.integers(1, MAX_LENGTH), max_size=60)


@given(lengths)
def test_every_sample_is_in_one_row_and_no_row_overflows(lengths: list[int]) -> None:
    groups = pack_by_length(lengths, max_length=MAX_LENGTH)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in group) <= MAX_LENGTH for group in groups)


@given(lengths)
def test_few_rows_are_used(lengths: list[int]) -> None:
    """Best-fit decreasing takes at most 11/9 of the best number of rows, and 1 (Johnson, 1973)."""
    rows = len(pack_by_length(lengths, max_length=MAX_LENGTH))
    at_least = -(-sum(lengths) // MAX_LENGTH)
    above_half = sum(length > MAX_LENGTH // 2 for length in lengths)
    assert rows >= max(at_least, above_half)
    # every two rows together are more than full, or one sample would have joined the other row
    assert rows <= 2 * at_least


@pytest.mark.parametrize("max_length", [4096, 8192])
def test_mixed_lengths_fill_their_rows_alike(max_length: int) -> None:
    """Ranks wait for the longest row of a step, so rows are balanced, not only full."""
    totals = []
    for seed in range(8):
        draw = random.Random(seed)
        lengths = [draw.randint(60, 1500) for _ in range(256)]
        groups = pack_by_length(lengths, max_length=max_length)
        totals += [sum(lengths[i] for i in group) for group in groups]
    assert sum(totals) / (len(totals) * max_length) >= 0.97
    assert min(totals) / max_length >= 0.9


@given(lengths)
def test_rows_come_in_the_order_of_the_buffer(lengths: list[int]) -> None:
    groups = pack_by_length(lengths, max_length=MAX_LENGTH)
    assert [group[0] for group in groups] == sorted(min(group) for group in groups)
    assert groups == pack_by_length(lengths, max_length=MAX_LENGTH)


def test_a_sample_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="a sample of 101 tokens is longer than a row of 100"):
        pack_by_length([5, 101], max_length=MAX_LENGTH)
