"""`http(s):`, `s3:` and fsspec URLs, against a server on loopback."""

import hashlib
import random
import sys
import time

import pytest

from data_prep.sources import UnreachableError, Wanted, fetch, fingerprint, http, remote
from tests.tiny.hubs import serve_hubs
from vlmcore.errors import DataError, MissingExtraError

ROWS = random.Random(0).randbytes(50_000)
SHA256 = hashlib.sha256(ROWS).hexdigest()


@pytest.fixture
def hubs(monkeypatch):
    with serve_hubs() as hubs:
        hubs.files["rows.bin"] = ROWS
        monkeypatch.setattr(http, "BACKOFF_S", 0.01)
        yield hubs


def get(source, dest, **given):
    fetch(source, dest, options={}, seed=0, **given)
    return {
        path.relative_to(dest).as_posix(): path.read_bytes()
        for path in dest.rglob("*")
        if path.is_file()
    }


def ranges(hubs, name):
    return [wanted for _, _, wanted in hubs.bodies(name)]


def test_a_file_comes_under_its_name_through_a_redirect(hubs, tmp_path):
    assert get(f"{hubs.url}/files/moved/rows.bin?sig=1", tmp_path) == {"rows.bin": ROWS}


def test_the_fingerprint_changes_with_the_content_and_costs_no_body(hubs):
    source = f"{hubs.url}/files/rows.bin"
    first = fingerprint(source)
    assert first == fingerprint(source)
    hubs.files["rows.bin"] = ROWS[:-1] + b"!"
    assert fingerprint(source) != first
    assert hubs.bodies("rows.bin") == []


def test_the_fingerprint_of_an_address_with_its_sha256_asks_nobody(hubs):
    source = f"{hubs.url}/files/rows.bin#sha256={SHA256}"
    assert fingerprint(source) == f"http:sha256={SHA256}"
    assert hubs.requests == []


def test_content_that_changed_since_it_was_pinned_is_refused(hubs, tmp_path):
    source = f"{hubs.url}/files/rows.bin"
    pinned = fingerprint(source)
    hubs.files["rows.bin"] = b"other"
    with pytest.raises(DataError, match="has changed since it was looked up. Run again"):
        get(source, tmp_path / "raw", pinned=pinned)


def test_another_sha256_than_the_given_one_is_an_error_and_leaves_nothing(hubs, tmp_path):
    source = f"{hubs.url}/files/rows.bin#sha256={'0' * 64}"
    with pytest.raises(DataError, match=f"sha256 is {SHA256}, expected 0000.*thrown away"):
        get(source, tmp_path / "raw", scratch=tmp_path / "scratch")
    assert [one for one in (tmp_path / "scratch").rglob("*") if one.is_file()] == []
    with pytest.raises(DataError, match="found #md5=1, expected #sha256= and 64 hexadecimal"):
        fingerprint(f"{hubs.url}/files/rows.bin#md5=1")


def test_a_broken_download_asks_only_for_the_rest(hubs, tmp_path):
    hubs.breaks["rows.bin"] = [20_000, 10_000]
    assert get(f"{hubs.url}/files/rows.bin", tmp_path) == {"rows.bin": ROWS}
    assert ranges(hubs, "rows.bin") == ["", "bytes=20000-", "bytes=30000-"]


def test_a_later_process_goes_on_with_the_part_that_an_earlier_one_left(hubs, tmp_path):
    source = f"{hubs.url}/files/rows.bin"
    hubs.breaks["rows.bin"] = [20_000] + [0] * http.MAX_ATTEMPTS
    with pytest.raises(UnreachableError):
        get(source, tmp_path / "raw", scratch=tmp_path / "scratch")
    hubs.requests.clear()
    assert get(source, tmp_path / "raw", scratch=tmp_path / "scratch") == {"rows.bin": ROWS}
    assert ranges(hubs, "rows.bin") == ["bytes=20000-"]


def test_a_part_of_older_content_is_never_mixed_with_newer(hubs, tmp_path):
    source = f"{hubs.url}/files/rows.bin#sha256={SHA256}"
    hubs.breaks["rows.bin"] = [20_000] + [0] * http.MAX_ATTEMPTS
    hubs.files["rows.bin"] = ROWS[::-1]
    with pytest.raises(UnreachableError):
        get(source, tmp_path / "raw", scratch=tmp_path / "scratch")
    hubs.breaks.clear()
    hubs.files["rows.bin"] = ROWS
    with pytest.raises(DataError, match="sha256 is .* expected"):  # found out, and thrown away
        get(source, tmp_path / "raw", scratch=tmp_path / "scratch")
    assert get(source, tmp_path / "raw", scratch=tmp_path / "scratch") == {"rows.bin": ROWS}
    plain = f"{hubs.url}/files/rows.bin"
    hubs.breaks["rows.bin"] = [20_000] + [0] * http.MAX_ATTEMPTS
    with pytest.raises(UnreachableError):
        get(plain, tmp_path / "new", scratch=tmp_path / "other")
    hubs.breaks.clear()
    hubs.files["rows.bin"] = ROWS[::-1]
    assert get(plain, tmp_path / "new", scratch=tmp_path / "other") == {"rows.bin": ROWS[::-1]}


def test_a_server_that_knows_no_ranges_is_asked_for_all_again(hubs, tmp_path):
    hubs.speaks_range = False
    hubs.breaks["rows.bin"] = [20_000]
    assert get(f"{hubs.url}/files/rows.bin", tmp_path) == {"rows.bin": ROWS}


def test_a_server_that_is_busy_is_asked_again_and_given_up_in_the_end(hubs, tmp_path):
    source = f"{hubs.url}/files/rows.bin#sha256={SHA256}"
    hubs.statuses = [503, 429, 500]
    assert get(source, tmp_path / "raw") == {"rows.bin": ROWS}
    hubs.statuses = [503] * http.MAX_ATTEMPTS
    with pytest.raises(UnreachableError, match="cannot be reached.*HTTP 503"):
        get(source, tmp_path / "again")


@pytest.mark.parametrize(
    ("status", "remedy"), [(401, "netrc"), (403, "account or token"), (404, "check the address")]
)
def test_a_refusal_is_not_repeated_and_says_what_to_do(hubs, status, remedy, tmp_path):
    hubs.statuses = [status]
    with pytest.raises(DataError, match=f"HTTP {status}.*{remedy}"):
        get(f"{hubs.url}/files/rows.bin#sha256={SHA256}", tmp_path)
    assert len(hubs.requests) == 1


def test_a_silent_server_is_given_up_soon(hubs, monkeypatch):
    monkeypatch.setattr(http, "PLAN_TIMEOUT_S", 0.2)
    hubs.delay_s = 1.0
    start = time.monotonic()
    with pytest.raises(UnreachableError, match="ReadTimeout"):
        fingerprint(f"{hubs.url}/files/rows.bin")
    assert time.monotonic() - start < 5


# -- fsspec ----------------------------------------------------------------------------------------


@pytest.fixture
def bucket(hubs, monkeypatch, tmp_path):
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", hubs.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    hubs.buckets["bucket"] = {
        "numbers/train.jsonl": b"{}\n",
        "numbers/images/a.bin": ROWS,
        "other/train.jsonl": b"other",
    }
    yield hubs
    s3fs.S3FileSystem.clear_instance_cache()


def test_all_below_a_prefix_comes_from_s3(bucket, tmp_path):
    expected = {"train.jsonl": b"{}\n", "images/a.bin": ROWS}
    assert get("s3:bucket/numbers", tmp_path / "a") == expected
    assert get("s3://bucket/numbers/", tmp_path / "b", wanted=Wanted(include=("*.jsonl",))) == {
        "train.jsonl": b"{}\n"
    }
    assert get("s3://bucket/numbers/images/a.bin", tmp_path / "c") == {"a.bin": ROWS}
    first = fingerprint("s3:bucket/numbers")
    assert first == fingerprint("s3:bucket/numbers")
    bucket.buckets["bucket"]["numbers/train.jsonl"] = b"[]\n"
    assert fingerprint("s3:bucket/numbers") != first
    with pytest.raises(DataError, match="has changed since it was looked up"):
        get("s3:bucket/numbers", tmp_path / "d", pinned=first)


def test_s3_goes_on_with_the_part_that_a_killed_process_left(bucket, tmp_path):
    source = "s3:bucket/numbers/images"
    pinned = fingerprint(source)
    part = tmp_path / "scratch" / pinned.partition(":")[2][:16] / ".a.bin.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(ROWS[:20_000])
    assert get(source, tmp_path / "raw", scratch=tmp_path / "scratch") == {"a.bin": ROWS}
    assert all(one.startswith("bytes=20000-") for one in ranges(bucket, "a.bin"))


def test_what_s3_does_not_have_or_cannot_be_reached_is_said(bucket, monkeypatch):
    import s3fs

    with pytest.raises(DataError, match="nothing is there. Check the bucket and the key"):
        fingerprint("s3:bucket/nothing")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UnreachableError, match="cannot be reached"):
        fingerprint("s3:bucket/numbers")


def test_any_url_of_fsspec_is_a_source(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe({"/set/data/train.jsonl": b"{}\n", "/set/a.bin": ROWS})
    assert get("memory://set", tmp_path / "a") == {"data/train.jsonl": b"{}\n", "a.bin": ROWS}
    source = f"file://{tmp_path}/a/a.bin"
    assert get(f"{source}#sha256={SHA256}", tmp_path / "b") == {"a.bin": ROWS}
    with pytest.raises(DataError, match=f"sha256 is {SHA256}, expected 1111"):
        get(f"{source}#sha256={'1' * 64}", tmp_path / "c")
    with pytest.raises(DataError, match="has no revision to choose by"):
        fingerprint(source, wanted=Wanted(revision="v1"))


def test_a_missing_filesystem_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    from fsspec.registry import _registry

    monkeypatch.delitem(_registry, "s3", raising=False)
    with pytest.raises(MissingExtraError, match="s3fs"):
        fingerprint("s3:bucket/numbers")
    assert remote.knows("gcs") and not remote.knows("gopher")
