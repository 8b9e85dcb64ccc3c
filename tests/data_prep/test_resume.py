"""A conversion that is killed goes on behind its last whole shard, and ends with the same bytes."""

import json
import signal
import subprocess
import sys
import time

import pytest

from data_prep.shards import write_shards

NUM_ROWS, PER_SHARD = 4000, 250
CONVERT = """
import sys
from pathlib import Path
from data_prep.shards import write_shards
if __name__ == "__main__":
    raw, dest, work = map(Path, sys.argv[1:])
    write_shards(raw, dest, max_bad_ratio=1, num_workers=1, max_samples_per_shard=250,
                 max_shard_bytes=300_000, work_dir=work)
"""


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    with (folder / "train.jsonl").open("w") as file:
        for i in range(NUM_ROWS):
            turns = [{"role": "user", "content": f"{i}?" + "x" * 500},
                     {"role": "assistant", "content": str(i) if i % 50 else ""}]  # fmt: skip
            file.write(json.dumps({"messages": turns}) + "\n")
    return folder


def convert(raw, dest, work):
    return write_shards(
        raw, dest, max_bad_ratio=1, num_workers=1, max_samples_per_shard=PER_SHARD,
        max_shard_bytes=300_000, work_dir=work,
    )  # fmt: skip


def test_after_a_kill_whole_shards_are_kept_and_one_at_most_is_repeated(raw, tmp_path, tree_digest):
    script, work = tmp_path / "convert.py", tmp_path / "work"
    script.write_text(CONVERT)
    process = subprocess.Popen(
        [sys.executable, str(script), str(raw), str(tmp_path / "killed"), str(work)]
    )
    while process.poll() is None and len(list(work.glob("*.json"))) < 3:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = {path: path.stat().st_ino for path in work.glob("*.json")}
    assert 3 <= len(whole) < 2 * NUM_ROWS // PER_SHARD
    unfinished = [p for p in work.glob("*.tar") if p.with_suffix(".json") not in whole]
    assert len(unfinished) <= 1
    tars = {path.stem: path.stat().st_ino for path in work.glob("*.tar")}
    report = convert(raw, tmp_path / "killed", work)
    fresh = convert(raw, tmp_path / "fresh", tmp_path / "other")
    assert report == fresh
    assert report.dropped == {"empty_answer": NUM_ROWS // 50}
    assert tree_digest(tmp_path / "killed") == tree_digest(tmp_path / "fresh")
    kept = {path.stat().st_ino for path in (tmp_path / "killed").glob("*.tar")}
    assert {tars[path.stem] for path in whole if path.stem in tars} <= kept
    assert not work.exists()


def test_a_shard_that_was_damaged_meanwhile_is_written_again(raw, tmp_path, tree_digest):
    convert(raw, tmp_path / "fresh", tmp_path / "other")
    work = tmp_path / "work"
    with pytest.raises(OSError, match="killed"):
        interrupted(raw, tmp_path / "again", work)
    tar = sorted(work.glob("*.tar"))[1]
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    convert(raw, tmp_path / "again", work)
    assert tree_digest(tmp_path / "again") == tree_digest(tmp_path / "fresh")


def interrupted(raw, dest, work):
    """A conversion that ends after its first five ranges of rows."""

    def run(write, ranges):
        for number, rows in enumerate(ranges):
            if number == 5:
                raise OSError("killed")
            yield write(rows)

    write_shards(
        raw, dest, max_bad_ratio=1, num_workers=1, max_samples_per_shard=PER_SHARD,
        max_shard_bytes=300_000, work_dir=work, run=run,
    )  # fmt: skip
