"""The store on a bad day, with real processes, real kills, a real full disk."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlmcore.artifacts import ArtifactRef, StageSpec, Store

SPEC = StageSpec("train.full", kind="train", version=1, params={"lr": 1e-3})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def build_two(build):
    (build.path / "sub").mkdir()
    (build.path / "sub/model").write_bytes(bytes(range(256)) * 40)
    (build.path / "config").write_text("{}")


def run_script(code: str, *args: object) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, args)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def wait_for(path: Path, timeout_s: float = 20) -> None:
    end = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.02)


# Builds in forked children; the n-th dies by SIGKILL at its n-th look at or change of the store.
KILL_EVERYWHERE = """
import json, os, shutil, signal, sys
from pathlib import Path
from vlmcore.artifacts import StageSpec, Store

root, kind = Path(sys.argv[1]), sys.argv[2]
spec = StageSpec("train.full", "train", 1, resumable="resumable" in kind)
WATCHED = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "os.listdir"}

def builder(store):
    def run(build):
        with open(root / "builder_runs", "a") as runs:
            runs.write("x")
        assert not (build.scratch / "step").exists() or spec.resumable
        (build.scratch / "step").write_text("1")
        assert not list(build.path.iterdir())
        (build.path / "a").mkdir()
        (build.path / "a/model").write_text("weights")
        (build.path / "b").write_text("config")
    return run

def forked(work):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitpid(pid, 0)[1]

def kill_at(n, folder):
    seen = 0
    def hook(event, args):
        nonlocal seen
        if event in WATCHED and args and str(folder) in str(args[0]):
            seen += 1
            if seen == n:
                os.kill(os.getpid(), 9)
    sys.addaudithook(hook)

n, kills, states = 0, 0, []
while True:
    n += 1
    folder = root / f"store{n}"
    store = Store(folder)
    if "again" in kind:  # the content is there already, under this key
        store.build(spec, builder(store))
    (root / "builder_runs").write_text("")
    refresh = "again" in kind

    def first():
        kill_at(n, folder)
        store.build(spec, builder(store), refresh=refresh)
    status = forked(first)
    if status == 0:
        break
    assert status == 9, f"step {n}: status {status}"
    kills += 1

    bad = store.verify()
    assert not bad, f"step {n}: {bad}"
    finished = (store.root / "work/train.full" / spec.key[:16] / "content/MANIFEST.json").exists()
    hit = store.lookup(spec.stage, spec.key)
    runs_before = (root / "builder_runs").read_text()

    result = store.build(spec, builder(store))
    runs = (root / "builder_runs").read_text()
    assert len(runs) <= 2, f"step {n}"
    if finished or hit:
        assert runs == runs_before, f"step {n}: finished work was done again"
    text = {p.name: p.read_text() for p in result.ref.path.rglob("*") if p.is_file()}
    assert (text["model"], text["b"]) == ("weights", "config"), f"step {n}"
    assert not store.verify(), f"step {n}"
    states.append(f"{'hit' if hit else 'finished' if finished else 'none'}:{result.state}")
    again = store.build(spec, builder(store), refresh=True)  # whatever a kill left is no hindrance
    assert again.ref == result.ref
    assert not [p for p in (folder / "work").rglob("*") if p.is_file()], f"step {n}: rubbish stays"
    shutil.rmtree(folder)
print(json.dumps({"kills": kills, "states": sorted(set(states))}))
"""


@pytest.mark.parametrize("kind", ["fresh", "resumable", "again", "again resumable"])
def test_a_kill_at_any_step_loses_nothing_and_leaves_nothing_half_written(tmp_path, kind):
    script = run_script(KILL_EVERYWHERE, tmp_path, kind)
    output, _ = script.communicate(timeout=240)
    assert script.returncode == 0, output
    told = json.loads(output.splitlines()[-1])
    assert told["kills"] > 25
    if "again" not in kind:
        # before the manifest it is built again; after it, only published; after the rename, found
        assert told["states"] == ["finished:cached", "hit:cached", "none:ran"]


def test_a_corrupt_byte_is_found_by_the_next_lookup_and_set_aside(store, caplog):
    ref = store.build(SPEC, build_two).ref
    flip_byte(ref.path / "sub/model")
    with caplog.at_level(logging.WARNING):
        assert store.lookup(ref.stage, ref.key) is None
    assert "sub/model: sha256" in caplog.text
    assert "expected" in caplog.text
    aside = list((store.root / "quarantine/train.full").iterdir())
    assert len(aside) == 1
    assert (aside[0] / "sub/model").stat().st_size == 256 * 40
    rebuilt = store.build(SPEC, build_two)
    assert (rebuilt.state, rebuilt.ref) == ("ran", ref)
    assert store.verify() == []


def flip_byte(path: Path, *, keep_mtime: bool = False) -> None:
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    if keep_mtime:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_corrupt_byte_behind_an_old_mtime_is_found_by_verify(store):
    ref = store.build(SPEC, build_two).ref
    flip_byte(ref.path / "sub/model", keep_mtime=True)
    assert store.lookup(ref.stage, ref.key) == ref  # the quick check reads no bytes
    assert store.verify(read_all=False) == []
    bad = store.verify()
    assert [(one.stage, one.digest, one.path, one.cause) for one in bad] == [
        ("train.full", ref.digest, "sub/model", "sha256")
    ]
    assert store.lookup(ref.stage, ref.key) == ref  # verify alone moves nothing
    assert store.verify(set_aside=True) == bad
    assert store.lookup(ref.stage, ref.key) is None
    assert store.build(SPEC, build_two).state == "ran"
    assert store.verify() == []


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    os.truncate(path, 100)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_link(path: Path) -> None:
    copy = path.parent.parent.parent.parent.parent / "elsewhere"
    shutil.move(path, copy)
    path.symlink_to(copy)


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (remove, "missing"),
        (truncate, "size"),
        (replace_by_folder, "missing"),
        (replace_by_link, "missing"),
    ],
)
def test_a_missing_or_changed_file_is_found_by_both_checks(store, damage, cause):
    ref = store.build(SPEC, build_two).ref
    damage(ref.path / "sub/model")
    assert ("sub/model", cause) in [(bad.path, bad.cause) for bad in store.verify()]
    assert ("sub/model", cause) in [(bad.path, bad.cause) for bad in store.verify(read_all=False)]
    assert store.lookup(ref.stage, ref.key) is None
    assert store.build(SPEC, build_two).state == "ran"


@pytest.mark.parametrize("text", [None, "", "{}", "{", "edited"])
def test_a_bad_manifest_is_found_and_set_aside(store, text):
    ref = store.build(SPEC, build_two).ref
    path = ref.path / "MANIFEST.json"
    if text is None:
        path.unlink()
    elif text == "edited":
        told = json.loads(path.read_text())
        told["files"] = told["files"][:1]
        path.write_text(json.dumps(told))
    else:
        path.write_text(text)
    assert [(bad.path, bad.cause) for bad in store.verify()] == [("MANIFEST.json", "manifest")]
    assert store.lookup(ref.stage, ref.key) is None
    assert store.build(SPEC, build_two).state == "ran"


def test_a_stray_file_is_told_and_moved_alone(store):
    ref = store.build(SPEC, build_two).ref
    (ref.path / "sub/shard-9.tar").write_text("nobody published this")
    assert store.lookup(ref.stage, ref.key) == ref
    bad = store.verify(set_aside=True)
    assert [(one.path, one.cause) for one in bad] == [("sub/shard-9.tar", "unexpected")]
    assert store.verify() == []
    assert store.lookup(ref.stage, ref.key) == ref
    (aside,) = (store.root / "quarantine/train.full").iterdir()
    assert aside.read_text() == "nobody published this"


RACE = """
import logging, sys, time
from pathlib import Path
from vlmcore.artifacts import StageSpec, Store

logging.basicConfig(level=logging.INFO, format="%(message)s")
root = Path(sys.argv[1])
while not (root / "go").exists():
    time.sleep(0.001)

def builder(build):
    with open(root / "runs", "a") as runs:
        runs.write("x")
    time.sleep(0.4)
    (build.path / "model").write_text("w")

result = Store(root / "store").build(StageSpec("train.full", "train", 1), builder)
print(result.state, result.ref.digest)
"""


def test_racing_processes_run_the_builder_once(tmp_path):
    racers = [run_script(RACE, tmp_path) for _ in range(4)]
    time.sleep(0.5)
    (tmp_path / "go").touch()
    outputs = [racer.communicate(timeout=60)[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 4, outputs
    assert (tmp_path / "runs").read_text() == "x"
    last = [output.splitlines()[-1].split() for output in outputs]
    assert sorted(state for state, _ in last) == ["cached", "cached", "cached", "ran"]
    assert len({digest for _, digest in last}) == 1
    pids = {str(racer.pid) for racer in racers}
    waits = [line for output in outputs for line in output.splitlines() if "waiting for" in line]
    assert len(waits) >= 3
    assert {word for line in waits for word in line.split()} & pids, waits


HOLD = """
import multiprocessing, os, sys, time
from pathlib import Path
from vlmcore.artifacts import StageSpec, Store

root = Path(sys.argv[1])

def builder(build):
    (build.path / "half").write_text("half")
    if os.fork() == 0:  # a worker that outlives its parent
        (root / "worker").write_text(str(os.getpid()))
        time.sleep(120)
        os._exit(0)
    time.sleep(120)

Store(root / "store").build(StageSpec("train.full", "train", 1), builder)
"""


def test_a_killed_holder_frees_the_lock_even_while_its_worker_lives(tmp_path):
    holder = run_script(HOLD, tmp_path)
    wait_for(tmp_path / "worker")
    time.sleep(0.1)  # the worker writes its number
    holder.kill()
    holder.wait()
    worker = int((tmp_path / "worker").read_text())
    try:
        os.kill(worker, 0)  # it does live
        start = time.monotonic()
        made = StageSpec("train.full", "train", 1)
        ref = Store(tmp_path / "store").build(made, build_two).ref
        assert time.monotonic() - start < 5
        assert not (ref.path / "half").exists()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_waiting_process_sees_who_builds(tmp_path):
    holder = run_script(HOLD, tmp_path)
    try:
        wait_for(tmp_path / "worker")
        waiter = run_script(RACE.replace('root / "go"', 'root / "worker"'), tmp_path)
        for line in waiter.stdout:
            if "waiting for" in line:
                break
        assert f"waiting for process {holder.pid} on " in line
    finally:
        holder.kill()
        holder.wait()
        os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)
    rest, _ = waiter.communicate(timeout=30)
    assert rest.splitlines()[-1].startswith("ran ")
    assert "waiting for" not in rest  # said once


def in_own_mounts(setup: str, code: str, *args: object) -> subprocess.CompletedProcess:
    """Runs Python code after a mount that only it sees; skips where mounts are not allowed."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody make a mount namespace")
    shell = f'{setup} && exec "$0" -c "$@"'
    command = ["unshare", "-rm", "sh", "-c", shell, sys.executable, code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


FULL_DISK = """
import sys
from pathlib import Path
from vlmcore.artifacts import StageSpec, Store
from vlmcore.errors import ArtifactError

store, how = Store(sys.argv[1]), sys.argv[2]
small = StageSpec("train.full", "train", 1, {"n": 1})
store.build(small, lambda build: (build.path / "model").write_bytes(bytes(500_000)) and None)

def too_big(build):
    if how == "python":
        (build.path / "model").write_bytes(bytes(8_000_000))
    elif how == "safetensors":
        import numpy as np
        from safetensors.numpy import save_file
        save_file({"w": np.zeros(2_000_000, np.float32)}, build.path / "model")
    else:  # only the store's own writing finds the disk full
        (build.path / "model").write_bytes(b"1")
        with open(build.path / "rest", "wb", buffering=0) as rest:
            try:
                while True:
                    rest.write(bytes(4096))
            except OSError:
                pass

big = StageSpec("train.full", "train", 1, {"n": 2})
try:
    store.build(big, too_big)
except ArtifactError as error:
    print(error)
assert store.lookup(big.stage, big.key) is None
assert store.lookup(small.stage, small.key)
assert store.verify() == [] and len(store.artifacts()) == 1
result = store.build(big, lambda build: (build.path / "model").write_bytes(b"fits") and None)
assert result.state == "ran" and store.verify() == []
print("went on")
"""


@pytest.mark.parametrize("how", ["python", "safetensors", "last bytes"])
def test_a_full_disk_is_explained_and_publishes_nothing(tmp_path, how):
    setup = f"mount -t tmpfs -o size=4m none {tmp_path}"
    done = in_own_mounts(setup, FULL_DISK, tmp_path / "store", how)
    assert done.returncode == 0, done.stderr
    message, last = done.stdout.splitlines()
    assert last == "went on"
    assert message.startswith("train.full: the disk is full: ")
    assert " MB written, 0.0 MB free in " in message or how == "safetensors"
    assert str(tmp_path / "store/work/train.full") in message
    assert "its last build took 0.5 MB" in message


READ_ONLY = """
import sys
from vlmcore.artifacts import StageSpec, Store
from vlmcore.errors import ArtifactError

store = Store(sys.argv[1])
made = StageSpec("train.full", "train", 1, {"lr": 1e-3})
print(store.build(made, None).state)
try:
    store.build(StageSpec("train.full", "train", 2), None)
except ArtifactError as error:
    print(error)
open(sys.argv[1] + "/try", "w")
"""


@pytest.mark.parametrize("mtime", ["kept", "changed"])
def test_hits_need_no_writing(store, mtime):
    ref = store.build(SPEC, build_two).ref
    if mtime == "changed":
        os.utime(ref.path / "config", ns=(1, 1))
    setup = f"mount --bind {store.root} {store.root} && mount -o remount,ro,bind {store.root}"
    done = in_own_mounts(setup, READ_ONLY, store.root)
    assert "Read-only file system" in done.stderr  # the store was so indeed
    state, message = done.stdout.splitlines()
    assert state == "cached"
    assert "train.full: cannot be built in this store" in message


def test_threads_of_one_process_build_a_key_once(store):
    from concurrent.futures import ThreadPoolExecutor

    runs = []

    def builder(build):
        runs.append(1)
        time.sleep(0.2)
        build_two(build)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: store.build(SPEC, builder), range(4)))
    assert len(runs) == 1
    assert len({result.ref.digest for result in results}) == 1


def test_a_published_object_that_went_bad_is_replaced_by_a_build_of_the_same_content(store):
    one = store.build(SPEC, build_two).ref
    truncate(one.path / "sub/model")
    other = StageSpec("train.full", kind="train", version=2)
    two: ArtifactRef = store.build(other, build_two).ref
    assert (two.digest, two.key == one.key) == (one.digest, False)
    assert store.verify() == []
    assert len(list((store.root / "quarantine/train.full").iterdir())) == 1
