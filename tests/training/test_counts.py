from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.tiny.rows import row_of
from vlmcore.dataloading.samples import PackedRow, TokenSample
from vlmcore.training.counts import counts_of


@pytest.fixture(autouse=True)
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def row(*lengths: int, dropped: dict[str, int]) -> PackedRow:
    """A row of samples whose first token carries no loss; padded to a multiple of 8."""
    samples = [
        TokenSample(
            __key__=str(length),
            __restore_key__=(),
            input_ids=torch.arange(length),
            labels=torch.arange(length),
            loss_scale=torch.tensor([0.0] + [0.5] * (length - 1)),
            position_ids=torch.arange(length).expand(3, -1),
        )
        for length in lengths
    ]
    made = row_of(samples, multiple=8)
    made.dropped = dropped
    return made


def test_a_step_counts_tokens_samples_and_what_was_dropped_by_cause() -> None:
    batch = [row(3, 2, dropped={"too_long": 2}), row(4, dropped={"bad_media": 1, "too_long": 5})]
    assert counts_of(batch) == {
        "loss_tokens": 2 + 1 + 3,
        "tokens": 9,
        "samples": 3,
        "dropped": 8,
        "attended_pairs": 6 + 3 + 10,
        "dropped_by_cause": {"too_long": 7, "bad_media": 1},
    }


def test_without_a_drop_no_cause_is_told() -> None:
    assert "dropped_by_cause" not in counts_of([row(3, dropped={})])
