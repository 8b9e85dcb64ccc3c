"""The store on a healthy day: build, find, refresh, name, explain."""

import json
import logging
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from vlmcore.artifacts import ArtifactRef, StageSpec, Store, downstream, explain_miss, lineage
from vlmcore.errors import ArtifactError


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def spec(stage: str = "train.full", **given) -> StageSpec:
    return StageSpec(stage, kind=stage.partition(".")[0], version=given.pop("version", 1), **given)


def writes(files: dict[str, str], metrics: dict | None = None):
    def builder(build):
        for name, text in files.items():
            path = build.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return metrics

    return builder


def never(build):
    raise AssertionError("the builder ran, though there was a hit")


def tree(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def test_a_second_build_is_a_hit_in_a_new_store_object(store):
    built = store.build(spec(params={"lr": 1e-3}), writes({"a/model": "weights"}))
    again = Store(store.root).build(spec(params={"lr": 0.001}), never)
    assert (built.state, again.state) == ("ran", "cached")
    assert again.ref == built.ref
    assert (built.ref.path / "a/model").read_text() == "weights"


def test_a_changed_parameter_builds_again_and_keeps_both(store):
    one = store.build(spec(params={"lr": 1}), writes({"model": "one"})).ref
    two = store.build(spec(params={"lr": 2}), writes({"model": "two"})).ref
    assert (one.path / "model").read_text() == "one"
    assert (two.path / "model").read_text() == "two"


def test_a_reference_survives_json(store):
    ref = store.build(spec(), writes({"model": "x"})).ref
    assert ArtifactRef.model_validate_json(ref.model_dump_json()) == ref


def test_the_manifest_tells_how_the_artifact_came_about(store):
    base = store.build(spec("swap"), writes({"w": "base"})).ref
    given = {"base": base, "data": [base, base]}
    built = spec(params={"lr": 1e-3, "at": Path("x/y")}, inputs=given, version=7)
    ref = store.build(built, writes({"w": "new"}, {"loss": 0.5, "worst": float("inf")})).ref
    shown = store.show("train.full")
    assert (shown.stage, shown.kind, shown.version) == ("train.full", "train", 7)
    assert (shown.key, shown.digest) == (built.key, ref.digest)
    assert shown.params == {"lr": 0.001, "at": "x/y"}
    assert shown.inputs["base"].digest == base.digest
    assert [one.key for one in shown.inputs["data"]] == [base.key, base.key]
    assert shown.metrics == {"loss": 0.5, "worst": "Infinity"}
    assert [(one.path, one.size) for one in shown.files] == [("w", 3)]
    assert (shown.num_files, shown.size_bytes) == (1, 3)
    assert {"python", "torch", "megatron-core"} <= set(shown.versions)
    assert json.loads((ref.path / "MANIFEST.json").read_bytes())["digest"] == ref.digest


def test_the_commit_and_its_cleanness_are_recorded(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@x"]
    (tmp_path / "f").write_text("1")
    commands = [["init", "-q"], ["add", "f"], ["commit", "-qm", "m"], ["rev-parse", "HEAD"]]
    for command in commands:
        done = subprocess.run([*git, *command], check=True, capture_output=True, text=True)
    store.build(spec("a"), writes({"w": "1"}))
    (tmp_path / "f").write_text("2")
    store.build(spec("b"), writes({"w": "1"}))
    assert store.show("a").git_commit == done.stdout.strip()
    assert store.show("b").git_commit == f"{done.stdout.strip()}-dirty"


def test_the_digest_is_of_paths_and_content_alone(store):
    digests = [
        store.build(spec(params={"n": n}), writes(files)).ref.digest
        for n, files in enumerate(
            [{"a": "1", "b": "2"}, {"b": "2", "a": "1"}, {"a": "2", "b": "1"}, {"a": "1", "c": "2"}]
        )
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_volatile_files_are_kept_and_verified_but_do_not_change_the_digest(store):
    volatile = ("logs/**", "metrics.jsonl", ".nv-meta/index.uuid")

    def build(n: int, uuid: str):
        files = {".nv-meta/index.uuid": uuid, "logs/a/rank0.log": uuid, "metrics.jsonl": uuid}
        made = spec(params={"n": n}, volatile=volatile)
        return store.build(made, writes({"model": "same", **files})).ref

    one, two = build(1, "first"), build(2, "second")
    assert one.digest == two.digest
    assert (one.path / "logs/a/rank0.log").read_text() == "first"
    (one.path / "logs/a/rank0.log").write_text("other")
    assert [bad.path for bad in store.verify()] == ["logs/a/rank0.log"]
    assert store.lookup(one.stage, one.key) is None


def test_scratch_and_work_are_gone_after_publishing(store):
    def builder(build):
        (build.scratch / "checkpoint").write_text("big")
        (build.path / "model").write_text("w")

    ref = store.build(spec(resumable=True), builder).ref
    assert tree(ref.path).keys() == {"model", "MANIFEST.json"}
    assert tree(store.root / "work") == {}


def test_a_refresh_with_the_same_content_keeps_the_digest_and_the_folder(store):
    one = store.build(spec(), writes({"model": "w"}, {"try": 1}))
    two = store.build(spec(), writes({"model": "w"}, {"try": 2}), refresh=True)
    assert (two.state, two.ref) == ("ran", one.ref)
    assert store.show("train.full").metrics == {"try": 2}
    assert len(store.artifacts()) == 1
    assert store.verify() == []


def test_a_refresh_with_other_content_moves_the_key_and_keeps_the_old(store):
    one = store.build(spec(), writes({"model": "w"})).ref
    two = store.build(spec(), writes({"model": "v"}), refresh=True).ref
    assert (two.key, two.digest == one.digest) == (one.key, False)
    assert store.lookup(one.stage, one.key) == two
    assert (one.path / "model").read_text() == "w"


def test_a_failed_build_keeps_its_work_and_the_next_starts_empty(store):
    def fails(build):
        (build.path / "train.log").write_text("the reason")
        raise RuntimeError("rank 1 died")

    with pytest.raises(RuntimeError, match="rank 1 died"):
        store.build(spec(), fails)
    assert list(tree(store.root / "work").values()) == ["the reason"]
    ref = store.build(spec(), writes({"model": "w"})).ref
    assert tree(ref.path).keys() == {"model", "MANIFEST.json"}


def test_an_interrupted_build_goes_on_with_another_value_of_what_it_resumes_over(store):
    def made(**params) -> StageSpec:
        return StageSpec(
            "train.full", "train", 1, params=params, resumable=True, resumes_over=("ranks",)
        )

    found = []

    def build(context):
        step = context.scratch / "step"
        found.append(step.exists())
        step.touch()
        if len(found) == 1:
            raise KeyboardInterrupt
        (context.path / "weights").write_text("w")

    with pytest.raises(KeyboardInterrupt):
        store.build(made(ranks=1, rate=0.1), build)
    store.build(made(ranks=1, rate=0.2), build)
    ref = store.build(made(ranks=2, rate=0.1), build).ref
    assert found == [False, False, True]
    assert ref.key == made(ranks=2, rate=0.1).key
    assert store.lookup("train.full", made(ranks=1, rate=0.1).key) is None


def test_a_resumable_build_goes_on_from_its_scratch(store):
    def step(build):
        done = build.scratch / "step"
        count = int(done.read_text()) + 1 if done.exists() else 1
        done.write_text(str(count))
        if count < 3:
            raise RuntimeError("killed")
        (build.path / "model").write_text(str(count))

    for _ in range(2):
        with pytest.raises(RuntimeError):
            store.build(spec(resumable=True), step)
    ref = store.build(spec(resumable=True), step).ref
    assert (ref.path / "model").read_text() == "3"
    with pytest.raises(RuntimeError):  # a refresh starts anew, not from the finished build
        store.build(spec(resumable=True), step, refresh=True)


def test_a_stage_that_leaves_nothing_is_an_error(store):
    with pytest.raises(ArtifactError, match=r"left no content in .*content"):
        store.build(spec(), lambda build: {"loss": 1.0})
    with pytest.raises(ArtifactError, match="1 volatile files"):
        store.build(spec(volatile=("*.log",)), writes({"a.log": "x"}))


def test_links_are_refused_by_name(store, tmp_path):
    (tmp_path / "outside").mkdir()

    def links(build):
        (build.path / "sub").symlink_to(tmp_path / "outside")
        (build.path / "model").write_text("w")

    with pytest.raises(ArtifactError, match=r"links.*\['sub'\]"):
        store.build(spec(), links)


def test_a_copied_artifact_is_not_taken_for_a_finished_build(store):
    base = store.build(spec("swap"), writes({"w": "base"})).ref

    def copies_and_dies(build):
        shutil.copytree(base.path, build.path, dirs_exist_ok=True)
        raise RuntimeError("killed before the rest came")

    made = spec(resumable=True)
    with pytest.raises(RuntimeError):
        store.build(made, copies_and_dies)
    assert store.build(made, writes({"rest": "1"})).state == "ran"


@pytest.mark.parametrize("stage", ["../up", "a/b", "", ".hidden", "a*"])
def test_a_stage_that_cannot_name_a_folder_is_refused(store, stage):
    with pytest.raises(ArtifactError, match="cannot name a folder"):
        store.build(spec(stage), writes({"a": "1"}))


def test_names_resolve_by_stage_digest_and_key(store):
    old = store.build(spec(params={"n": 1}), writes({"w": "1"})).ref
    new = store.build(spec(params={"n": 2}), writes({"w": "2"})).ref
    for name in ("train.full", new.digest[:8], new.key[:8], f"train.full@{new.digest[:8]}"):
        assert store.resolve(name).digest == new.digest
    assert store.resolve(old.digest[:12]).key == old.key
    with pytest.raises(ArtifactError, match=r"Expected a stage \(train\.full\)"):
        store.resolve("train.ful")


def test_an_ambiguous_name_lists_what_it_could_mean(store):
    refs = [store.build(spec(stage), writes({"w": "same"})).ref for stage in ("a", "b")]
    with pytest.raises(ArtifactError) as caught:
        store.resolve(refs[0].digest[:8])
    assert all(str(ref) in str(caught.value) for ref in refs)
    assert store.resolve(f"b@{refs[1].digest[:8]}").stage == "b"


def test_a_miss_is_explained_by_what_changed(store):
    base = store.build(spec("swap"), writes({"w": "base"})).ref
    other = store.build(spec("swap", params={"llm": "b"}), writes({"w": "other"})).ref
    params = {"learning_rate": 1e-3, "optim": {"beta": 0.9, "eps": 1e-8}, "packing": True}

    def why(params=params, inputs=None, version=1):
        inputs = {"base": base, "data": [base]} if inputs is None else inputs
        return explain_miss(store, "train.full", version=version, params=params, inputs=inputs)

    assert why() == ["never built"]
    given = {"base": base, "data": [base]}
    ref = store.build(spec(params=params, inputs=given), writes({"w": "x"})).ref
    changed = {"learning_rate": 1e-4, "optim": {"beta": 0.9, "eps": 1e-8}, "seed": 1}
    assert why(changed) == [
        "learning_rate: 0.001 → 0.0001",
        "packing: true → (unset)",
        "seed: (unset) → 1",
    ]
    assert why({**params, "optim": {"beta": 0.95, "eps": 1e-8}}) == ["optim.beta: 0.9 → 0.95"]
    assert why(version=2) == ["version 1 → 2"]
    digests = f"digest {base.digest[:8]}… → {other.digest[:8]}…"
    assert why(inputs={"base": other, "data": [base]}) == [f"input base: {digests}"]
    assert why(inputs={"base": base, "data": [other]}) == [f"input data[0]: {digests}"]
    assert why(inputs={"base": None, "data": None}) == [
        "input base: built first",
        "input data: built first",
    ]
    shutil.rmtree(ref.path)
    assert why() == ["same as its last build, whose content is gone or damaged"]


def test_lineage_and_downstream_follow_the_records(store):
    data = store.build(spec("data"), writes({"w": "d"})).ref
    swap = store.build(spec("swap"), writes({"w": "s"})).ref
    align_inputs = {"base": swap, "data": [data]}
    align = store.build(spec("train.align", inputs=align_inputs), writes({"w": "a"})).ref
    full_inputs = {"base": align, "data": [data]}
    full = store.build(spec("train.full", inputs=full_inputs), writes({"w": "f"})).ref

    top = lineage(store, store.resolve("train.full"))
    assert [(depth, node.ref.stage) for depth, node in top.walk()] == [
        (0, "train.full"),
        (1, "train.align"),
        (2, "swap"),
        (2, "data"),
        (1, "data"),
    ]
    assert top.ref.digest == full.digest
    assert top.inputs["base"].inputs["data[0]"] is top.inputs["data[0]"]

    def after(name):
        return [record.stage for record in downstream(store, store.resolve(name))]

    assert after("swap") == ["train.align", "train.full"]
    assert after("train.full") == []
    (store.root / "keys/swap" / f"{swap.key[:16]}.json").unlink()
    lost = lineage(store, store.resolve("train.full")).inputs["base"].inputs["base"]
    assert (lost.record, lost.ref.digest) == (None, swap.digest)


def test_a_moved_store_still_hits_and_hashes_only_once(store, tmp_path, monkeypatch):
    made = spec()
    store.build(made, writes({"model": "w" * 100}))
    moved = Store(shutil.copytree(store.root, tmp_path / "moved", copy_function=shutil.copyfile))
    assert (hit := moved.lookup(made.stage, made.key)) is not None
    assert hit.path.is_relative_to(tmp_path / "moved")
    monkeypatch.setattr("hashlib.file_digest", never)
    assert moved.lookup(made.stage, made.key) == hit


def test_a_hit_writes_nothing_and_starts_no_process(store, monkeypatch):
    store.build(spec(), writes({"model": "w"}))
    before = {path: path.stat().st_mtime_ns for path in store.root.rglob("*")}
    monkeypatch.setattr("subprocess.Popen", never)
    assert store.build(spec(), never).state == "cached"
    assert {path: path.stat().st_mtime_ns for path in store.root.rglob("*")} == before


def test_an_artifact_without_its_manifest_cannot_be_shown(store):
    ref = store.build(spec(), writes({"model": "w"})).ref
    (ref.path / "MANIFEST.json").unlink()
    with pytest.raises(ArtifactError, match="artifacts verify"):
        store.show("train.full")


def test_an_unreadable_record_is_a_miss_with_a_warning(store, caplog):
    ref = store.build(spec(), writes({"model": "w"})).ref
    path = store.root / "keys/train.full" / f"{ref.key[:16]}.json"
    path.write_text(path.read_text()[:40])
    with caplog.at_level(logging.WARNING):
        assert store.lookup(ref.stage, ref.key) is None
    assert path.name in caplog.text
    assert [(bad.path, bad.cause) for bad in store.verify()] == [
        (f"keys/train.full/{path.name}", "manifest")
    ]
    assert store.build(spec(), writes({"model": "w"})).ref == ref
    assert store.verify() == []


def test_os_utime_is_never_asked_of_a_whole_artifact(store, monkeypatch):
    ref = store.build(spec(), writes({"model": "w"})).ref
    monkeypatch.setattr(os, "utime", never)
    assert store.lookup(ref.stage, ref.key) == ref
