"""`hf:` and `modelscope:` through their real clients, against a hub on loopback."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from data_prep.sources import UnreachableError, Wanted, fetch, fingerprint, http
from data_prep.tables import find_tables
from tests.tiny.hubs import serve_hubs
from vlmcore.errors import DataError, MissingExtraError

PICTURE = random.Random(0).randbytes(5000)  # large enough for LFS
FILES = {
    "README.md": b"---\nlicense: mit\n---\nOf numbers.\n",
    ".gitattributes": b"*.png filter=lfs\n",
    "train.jsonl": b'{"id": 1}\n{"id": 2}\n',
    "test.jsonl": b'{"id": 3}\n',
    "images/a.png": PICTURE,
    "images/b.png": PICTURE[::-1],
}
SOURCES = ["hf:me/numbers", "modelscope:me/numbers"]


@pytest.fixture
def hubs(monkeypatch, tmp_path):
    from huggingface_hub import constants

    with serve_hubs() as hubs:
        # what HF_ENDPOINT sets in a new process
        monkeypatch.setattr(constants, "ENDPOINT", hubs.url)
        template = hubs.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf-cache"))
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hubs.url)
        monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "modelscope"))
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope-cache"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(http, "BACKOFF_S", 0.01)
        yield hubs


def get(source, dest, **given):
    fetch(source, dest, options={}, seed=0, **given)
    return {
        path.relative_to(dest).as_posix(): path.read_bytes()
        for path in dest.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("source", SOURCES)
def test_a_repository_comes_byte_for_byte_without_its_hidden_files(hubs, source, tmp_path):
    hubs.add_repository("me/numbers", FILES)
    found = get(source, tmp_path / "raw")
    assert found == {name: data for name, data in FILES.items() if name[0] != "."}
    assert set(find_tables(tmp_path / "raw")) == {"train", "test"}


@pytest.mark.parametrize("source", ["hf:models/me/net", "modelscope:models/me/net"])
def test_a_model_repository_is_a_source_too(hubs, source, tmp_path):
    hubs.add_repository("me/net", {"data/train.jsonl": b"{}\n"}, kind="models")
    assert get(source, tmp_path / "raw") == {"data/train.jsonl": b"{}\n"}


def test_the_fingerprint_is_the_commit_that_the_branch_stands_at(hubs):
    first = hubs.add_repository("me/numbers", FILES)
    assert fingerprint("hf:me/numbers") == f"hf:me/numbers@{first}"
    dev = hubs.add_repository("me/numbers", {"train.jsonl": b"{}"}, branch="dev")
    wanted = Wanted(revision="dev")
    assert fingerprint("hf:me/numbers", wanted=wanted) == f"hf:me/numbers@{dev}" != first


def test_what_is_fetched_is_the_pinned_commit_though_the_branch_has_moved(hubs, tmp_path):
    hubs.add_repository("me/numbers", {"train.jsonl": b"old\n"})
    pinned = fingerprint("hf:me/numbers")
    hubs.add_repository("me/numbers", {"train.jsonl": b"new\n"})
    assert get("hf:me/numbers", tmp_path / "a", pinned=pinned) == {"train.jsonl": b"old\n"}
    assert get("hf:me/numbers", tmp_path / "b") == {"train.jsonl": b"new\n"}


def test_modelscope_pins_the_listing_and_refuses_another_one(hubs, tmp_path):
    hubs.add_repository("me/numbers", {"train.jsonl": b"old\n"})
    pinned = fingerprint("modelscope:me/numbers")
    hubs.add_repository("me/numbers", {"train.jsonl": b"new\n"})
    assert fingerprint("modelscope:me/numbers") != pinned
    with pytest.raises(DataError, match="has changed since it was looked up. Run again"):
        get("modelscope:me/numbers", tmp_path / "raw", pinned=pinned)


@pytest.mark.parametrize("scheme", ["hf", "modelscope"])
def test_a_full_commit_is_pinned_without_the_hub(hubs, scheme):
    commit = "0123456789abcdef0123456789abcdef01234567"
    found = fingerprint(f"{scheme}:me/numbers", wanted=Wanted(revision=commit))
    assert found == f"{scheme}:me/numbers@{commit}"
    assert hubs.requests == []


def test_only_the_tables_of_the_wanted_subset_and_split_are_fetched(hubs, tmp_path):
    names = [f"{s}/{p}-00000-of-00001.parquet" for s in ("art", "math") for p in ("dev", "test")]
    hubs.add_repository("me/mmmu", {name: name.encode() for name in [*names, "pictures/a.png"]})
    found = get("hf:me/mmmu", tmp_path / "raw", wanted=Wanted(subset="math", split="dev"))
    assert set(found) == {"math/dev-00000-of-00001.parquet", "pictures/a.png"}
    with pytest.raises(DataError, match="several subsets, set `subset` to one of 'art', 'math'"):
        get("hf:me/mmmu", tmp_path / "all")
    assert len(hubs.bodies(".parquet")) == 1  # the fault was found before anything was fetched


def test_the_readme_of_the_repository_says_what_its_subsets_are(hubs, tmp_path):
    readme = (
        "---\nconfigs:\n- config_name: easy\n  data_files:\n  - split: train\n    path: x/1-*\n"
        "- config_name: hard\n  data_files: x/2-*.jsonl\n---\n"
    )
    files = {"README.md": readme.encode(), "x/1-a.jsonl": b"1", "x/2-a.jsonl": b"2"}
    hubs.add_repository("me/two", files)
    found = get("hf:me/two", tmp_path / "raw", wanted=Wanted(subset="hard"))
    assert set(found) == {"README.md", "x/2-a.jsonl"}
    tables = find_tables(tmp_path / "raw", subset="hard")
    assert tables == {"train": [tmp_path / "raw/x/2-a.jsonl"]}


@pytest.mark.parametrize("source", SOURCES)
def test_include_leaves_the_rest_at_the_hub(hubs, source, tmp_path):
    hubs.add_repository("me/numbers", FILES)
    wanted = Wanted(include=("test.*", "images/b*"))
    assert set(get(source, tmp_path / "raw", wanted=wanted)) == {"test.jsonl", "images/b.png"}
    with pytest.raises(DataError, match="none of its 6 files is wanted. Check `include`: nope"):
        get(source, tmp_path / "none", wanted=Wanted(include=("nope",)))


@pytest.mark.parametrize("source", SOURCES)
def test_damaged_content_is_found_thrown_away_and_fetched_again(
    hubs, source, tmp_path, monkeypatch
):
    monkeypatch.setattr("modelscope_hub._download.DOWNLOAD_INTEGRITY_RETRY_BACKOFF", 0.01)
    hubs.add_repository("me/numbers", FILES)
    for name in ("images/a.png", "train.jsonl"):
        hubs.damaged = {name}
        with pytest.raises(DataError, match="thrown away; run again"):
            get(source, tmp_path / "raw", scratch=tmp_path / name)
        hubs.damaged = set()
        found = get(source, tmp_path / f"again/{name}", scratch=tmp_path / name)
        assert found[name] == FILES[name]


def test_a_download_that_breaks_off_goes_on_where_it_stopped(hubs, tmp_path):
    hubs.add_repository("me/numbers", {"train.jsonl": b"{}", "a.png": PICTURE})
    hubs.breaks["a.png"] = [3000]
    assert get("hf:me/numbers", tmp_path / "raw")["a.png"] == PICTURE
    # the hub, and the CDN that it leads to, are asked for the rest alone
    assert [part for _, _, part in hubs.bodies("a.png")] == ["", "", "bytes=3000-", "bytes=3000-"]


KILLED = """
import sys
from pathlib import Path
from data_prep.sources import fetch
fetch(sys.argv[1], Path(sys.argv[2]), options={}, seed=0, scratch=Path(sys.argv[3]))
"""


@pytest.mark.slow
def test_a_killed_fetch_goes_on_with_the_bytes_that_it_had(hubs, tmp_path):
    large = random.Random(1).randbytes(4_000_000)
    hubs.add_repository("me/large", {"train.jsonl": b"{}\n", "big.bin": large})
    hubs.repositories["datasets/me/large"].token = "secret"
    hubs.bytes_per_s = 4_000_000
    environment = {**os.environ, "HF_ENDPOINT": hubs.url, "HF_TOKEN": "secret"}
    command = [sys.executable, "-c", KILLED, "hf:me/large", str(tmp_path / "raw")]
    command.append(str(tmp_path / "scratch"))
    child = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 120
    while not any(p.stat().st_size for p in tmp_path.glob("scratch/*/.big.bin.part")):
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    (part,) = tmp_path.glob("scratch/*/.big.bin.part")
    size = part.stat().st_size
    assert 0 < size < len(large)
    hubs.bytes_per_s = None
    subprocess.run(command, env=environment, check=True)
    assert (tmp_path / "raw" / "big.bin").read_bytes() == large
    assert hubs.bodies("big.bin")[-1][2] == f"bytes={size}-"


def test_what_was_downloaded_is_not_downloaded_again_by_a_fetch_that_was_killed_later(
    hubs, tmp_path
):
    hubs.add_repository("me/numbers", FILES)
    get("hf:me/numbers", tmp_path / "killed", scratch=tmp_path / "scratch")
    hubs.requests.clear()
    assert get("hf:me/numbers", tmp_path / "raw", scratch=tmp_path / "scratch")["test.jsonl"]
    assert not [one for one in hubs.requests if "resolve" in one[1]]


def test_tar_shards_of_another_subset_stay_at_the_hub(hubs, tmp_path):
    hubs.add_repository("me/tars", {f"{s}/train-{n}.tar": b"" for s in "ab" for n in range(2)})
    (tmp_path / "raw").mkdir()
    with pytest.raises(DataError, match="train-0.tar.*is damaged"):  # empty: but only b's come
        get("hf:me/tars", tmp_path / "raw", wanted=Wanted(subset="b"))
    assert {one[1].split("/")[-2] for one in hubs.bodies(".tar")} == {"b"}


def test_private_gated_and_unknown_repositories_say_what_to_do(hubs, tmp_path, monkeypatch):
    hubs.add_repository("me/numbers", FILES)
    repository = hubs.repositories["datasets/me/numbers"]
    with pytest.raises(DataError, match="me/nothing.*no such repository, or it is private.*HF_TOK"):
        fingerprint("hf:me/nothing")
    with pytest.raises(DataError, match="no revision 'v9': expected a branch, a tag or a commit"):
        fingerprint("hf:me/numbers", wanted=Wanted(revision="v9"))
    with pytest.raises(DataError, match="Expected hf:USER/NAME"):
        fingerprint("hf:me/my/numbers")
    repository.token = "secret"
    with pytest.raises(DataError, match="set HF_TOKEN"):
        fingerprint("hf:me/numbers")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert get("hf:me/numbers", tmp_path / "raw")["images/a.png"] == PICTURE
    repository.is_gated = True
    with pytest.raises(DataError, match="is gated: accept its terms"):
        fingerprint("hf:me/numbers")


def test_modelscope_tells_an_unknown_repository_from_a_private_one(hubs, tmp_path, monkeypatch):
    hubs.add_repository("me/numbers", FILES)
    with pytest.raises(DataError, match="no such repository.*MODELSCOPE_API_TOKEN"):
        fingerprint("modelscope:me/nothing")
    hubs.repositories["datasets/me/numbers"].token = "secret"
    with pytest.raises(DataError, match="MODELSCOPE_API_TOKEN"):
        fingerprint("modelscope:me/numbers")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "secret")
    assert get("modelscope:me/numbers", tmp_path / "raw")["images/a.png"] == PICTURE


def test_a_missing_client_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    with pytest.raises(MissingExtraError, match="pip install modelscope-hub"):
        fingerprint("modelscope:me/numbers")


@pytest.mark.parametrize("source", SOURCES)
def test_a_hub_that_is_silent_or_absent_is_given_up_soon(hubs, source, monkeypatch):
    hubs.add_repository("me/numbers", FILES)
    for module in ("hf", "modelscope"):
        monkeypatch.setattr(f"data_prep.sources.{module}.PLAN_TIMEOUT_S", 0.2)
    hubs.delay_s = 1.0
    start = time.monotonic()
    with pytest.raises(UnreachableError, match="cannot be reached.*Check the network"):
        fingerprint(source)
    assert time.monotonic() - start < 5
    hubs.delay_s = 0
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UnreachableError, match="127.0.0.1:9"):
        fingerprint(source)


def test_offline_a_pinned_commit_comes_from_the_clients_cache(hubs, tmp_path, monkeypatch):
    from huggingface_hub import snapshot_download

    commit = hubs.add_repository("me/numbers", FILES)
    pinned = f"hf:me/numbers@{commit}"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UnreachableError):
        get("hf:me/numbers", tmp_path / "none", pinned=pinned)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    snapshot_download("me/numbers", repo_type="dataset", endpoint=hubs.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert get("hf:me/numbers", tmp_path / "raw", pinned=pinned)["images/a.png"] == PICTURE
    assert (tmp_path / "raw" / "images" / "a.png").is_symlink() is False


def raw_artifact(tmp_path, *, dry=False, **dataset):
    from tasks.caching import Run
    from tasks.data import raw_dataset
    from vlmcore.artifacts import Store
    from vlmcore.recipe.schema import Dataset

    run = Run(Store(tmp_path / "store"), log_dir=tmp_path / "logs", dry=dry)
    ref = raw_dataset(run, "d", Dataset(source="hf:me/numbers", **dataset), seed=0)
    return run.outcomes[0], ref


def test_a_plan_and_a_run_without_the_hub_go_on_with_the_commit_in_the_store(
    hubs, tmp_path, monkeypatch, caplog
):
    commit = hubs.add_repository("me/numbers", FILES)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    outcome, ref = raw_artifact(tmp_path, dry=True)
    assert (outcome.state, ref) == ("to run", None)
    assert "cannot tell whether it is cached" in caplog.text
    with pytest.raises(UnreachableError):
        raw_artifact(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    outcome, built = raw_artifact(tmp_path)
    assert outcome.state == "ran"
    record = json.loads((built.path / "MANIFEST.json").read_text())
    assert record["params"]["fingerprint"] == f"hf:me/numbers@{commit}"
    digest = hashlib.sha256((built.path / "images/a.png").read_bytes()).hexdigest()
    assert digest == hashlib.sha256(PICTURE).hexdigest()
    assert raw_artifact(tmp_path)[0].state == "cached"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert raw_artifact(tmp_path)[1] == built
    assert raw_artifact(tmp_path, dry=True)[0].state == "cached"
    assert raw_artifact(tmp_path, dry=True, split="test")[0].state == "to run"
