"""Whoever waits is told how far it is."""

import time

from data_prep import progress
from data_prep.progress import watched
from data_prep.shards import write_shards
from data_prep.sources import Wanted, fetch


def test_what_has_come_is_told_at_each_further_percent(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "POLL_S", 0.01)
    told = []
    with watched(tmp_path, total_bytes=200_000, on_progress=lambda *one: told.append(one)):
        for name, size_mb in {"a": 0.05, "b": 0.1, "c": 0.15, "d": 0.2}.items():
            (tmp_path / name).write_bytes(bytes(50_000))
            began = time.monotonic()
            while (size_mb, 0.2, "MB") not in told:
                assert time.monotonic() - began < 10
                time.sleep(0.01)
    assert told[-1] == (0.2, 0.2, "MB")
    assert len(told) <= 6  # of the same percent nothing is said twice


def test_a_download_and_the_rows_behind_it_end_at_their_full_number(tmp_path, make_raw, row):
    make_raw(train=[row()] * 7, val=[row()] * 3)
    told = []
    fetch(
        f"file://{tmp_path / 'raw'}", tmp_path / "fetched", options={}, seed=0,
        wanted=Wanted(), scratch=tmp_path / "scratch", on_progress=lambda *one: told.append(one),
    )  # fmt: skip
    size_mb = (
        sum(one.stat().st_size for one in (tmp_path / "raw").rglob("*") if one.is_file()) / 1e6
    )
    assert told[-1] == (size_mb, size_mb, "MB")
    told.clear()
    write_shards(
        tmp_path / "fetched", tmp_path / "shards", max_bad_ratio=0, num_workers=1,
        max_samples_per_shard=4, on_progress=lambda *one: told.append(one),
    )  # fmt: skip
    assert told == [(4, 10, "rows"), (7, 10, "rows"), (10, 10, "rows")]
