"""Weights in and out of Megatron-Core beside `cp -r` of the same bytes, in one run.

    python benchmarks/convert.py [--json] [--models NAME …] [--layers N] [--repeats N] [--folder F]

Random weights at real shapes: Qwen2.5-VL-3B and Qwen3-VL-30B-A3B with 4 layers; 25 GB of disk
while it runs. Every figure is of a whole command, from its start to its end, on a source that was
read before; what stands unwritten in the page cache is flushed before each. Both sides end when
every byte is on the disk: conversions do by themselves, `cp -r` is followed by `sync` of its copy.
What cp takes until it leaves its copy in the page cache is printed too.

With `--json`, one object: to_mcore_vs_cp and to_hf_vs_cp are cp's time over ours, the median of the
repeats, the worst of the models; `…_vs_cp_unsynced` are the same for cp without the disk;
peak_anonymous_mb is the largest sum of RssAnon over all processes of a conversion;
repeated_tensors counts what was begun again after a kill -9.
"""

import argparse
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.fixtures.configs import CONFIGS  # noqa: E402
from vlmcore.weights.journal import Progress  # noqa: E402
from vlmcore.weights.shards import plan_shards, shard_index  # noqa: E402

LAYERS = {"qwen2.5-vl-3b": None, "qwen3-vl-30b-a3b": 4}  # None: as many as the model has
SHARD_BYTES = 4 * 10**9
CONVERT = [sys.executable, "-m", "flows", "convert"]
BLOCK = 1 << 26


def write_source(folder: Path, name: str, layers: int | None) -> int:
    """An HF folder of random bfloat16 weights in published form; gives its bytes."""
    from vlmcore.weights.architecture import published_shapes

    config = deepcopy(CONFIGS[name][1])
    if layers is not None:
        config.get("text_config", config)["num_hidden_layers"] = layers
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {key: (shape, "bfloat16") for key, shape in published_shapes(folder).items()}
    shards = plan_shards(tensors, max_shard_bytes=SHARD_BYTES)
    generator = np.random.default_rng(0)
    for shard in shards:
        with (folder / shard.name).open("wb") as file:
            file.write(shard.header)
            for key in shard.starts:
                left = math.prod(tensors[key][0]) * 2
                while left:
                    block = min(left, BLOCK)
                    file.write(generator.bytes(block))
                    left -= block
    if (index := shard_index(shards)) is not None:
        (folder / "model.safetensors.index.json").write_text(index)
    return sum(shard.size_bytes for shard in shards)


def warm(folder: Path) -> None:
    """Reads every byte, and leaves nothing for the disk to write."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(BLOCK):
                    pass
    os.sync()


def timed(command: list[str], source: Path) -> tuple[float, float]:
    """(Wall seconds, peak sum of RssAnon in MB) of a command that reads `source`."""
    warm(source)
    began = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    peak = [0.0]
    sampler = threading.Thread(target=watch, args=(process.pid, peak), daemon=True)
    sampler.start()
    _, words = process.communicate()
    wall_s = time.perf_counter() - began
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}\n{words}")
    return wall_s, peak[0]


def watch(pid: int, peak: list[float]) -> None:
    while psutil.pid_exists(pid):
        try:
            root = psutil.Process(pid)
            family = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        peak[0] = max(peak[0], sum(map(anonymous_mb, family)))
        time.sleep(0.02)


def anonymous_mb(process: psutil.Process) -> float:
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    found = [line for line in lines if line.startswith("RssAnon:")]
    return int(found[0].split()[1]) * 1024 / 1e6 if found else 0.0


def kill_and_continue(source: Path, target: Path) -> dict[str, int]:
    """Kills a conversion when a third of it is done, and runs it again."""
    command = [*CONVERT, "to-mcore", str(source), str(target), "--json"]
    journal = target.with_name(f"{target.name}.partial") / "journal.jsonl"
    total = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=ROOT)
    while sum(done.size_bytes for done in read(journal).done.values()) < total / 3:
        if process.poll() is not None:
            sys.exit("the conversion ended before it could be killed")
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(workers, timeout=10)
    before = read(journal)
    finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT)
    report = json.loads(finished.stdout)
    if report["resumed"] != len(before.done):
        sys.exit(f"{len(before.done)} units were done, {report['resumed']} were taken over")
    return {"done_before_kill": len(before.done), "repeated": len(before.begun)}


def read(journal: Path) -> Progress:
    progress = Progress()
    if journal.exists():
        for line in journal.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                progress.take(line)
    return progress


def measure(folder: Path, name: str, layers: int | None, repeats: int) -> dict[str, object]:
    source, mcore, hf, copy = (folder / part for part in ("source", "mcore", "hf", "copy"))
    size = write_source(source, name, layers)
    seconds: dict[str, list[float]] = {}
    peaks = []

    def run(what: str, command: list[str], reads: Path) -> None:
        wall_s, peak_mb = timed(command, reads)
        seconds.setdefault(what, []).append(round(wall_s, 2))
        peaks.append(peak_mb)

    def run_cp(what: str, reads: Path) -> None:
        wall_s, _ = timed(["cp", "-r", str(reads), str(copy)], reads)
        began = time.perf_counter()
        subprocess.run(["sync", *(p for p in copy.rglob("*") if p.is_file())], check=True)
        synced_s = wall_s + time.perf_counter() - began
        seconds.setdefault(f"{what}_unsynced", []).append(round(wall_s, 2))
        seconds.setdefault(what, []).append(round(synced_s, 2))
        shutil.rmtree(copy)

    for _ in range(repeats):
        run_cp("cp_hf", source)
        run("to_mcore", [*CONVERT, "to-mcore", str(source), str(mcore)], source)
        run_cp("cp_mcore", mcore)
        run("to_hf", [*CONVERT, "to-hf", str(mcore), str(hf)], mcore)
        shutil.rmtree(hf)
        shutil.rmtree(mcore)
    killed = kill_and_continue(source, mcore)
    shutil.rmtree(source)
    shutil.rmtree(mcore)
    pairs = {"to_mcore": "cp_hf", "to_hf": "cp_mcore"}
    return {
        "gigabytes": round(size / 1e9, 2),
        "seconds": seconds,
        **{
            f"{ours}_vs_cp{kind}": round(
                statistics.median(
                    a / b for a, b in zip(seconds[theirs + kind], seconds[ours], strict=True)
                ),
                2,
            )
            for ours, theirs in pairs.items()
            for kind in ("", "_unsynced")
        },
        "peak_anonymous_mb": round(max(peaks)),
        **killed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    parser.add_argument("--models", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--layers", type=int, help="decoder layers; fewer for a quick run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="disk to measure on; default the temporary one")
    args = parser.parse_args()
    models = {}
    for name in args.models:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            layers = args.layers or LAYERS[name]
            models[name] = measure(Path(folder), name, layers, args.repeats)
    found = list(models.values())
    figures = {
        **{
            ratio: min(one[ratio] for one in found)
            for ours in ("to_mcore_vs_cp", "to_hf_vs_cp")
            for ratio in (ours, f"{ours}_unsynced")
        },
        "peak_anonymous_mb": max(one["peak_anonymous_mb"] for one in found),
        "repeated_tensors": max(one["repeated"] for one in found),
        "num_cpus": os.cpu_count(),
        "models": models,
    }
    if args.json:
        print(json.dumps(figures))
        return
    for name, one in models.items():
        print(f"{name}, {one['gigabytes']} GB:")
        for what, walls in one["seconds"].items():
            print(f"  {what:<17} {', '.join(f'{wall:6.2f}' for wall in walls)} s")
        print(
            f"  to_mcore {one['to_mcore_vs_cp']} of cp's speed, to_hf {one['to_hf_vs_cp']}; "
            f"{one['peak_anonymous_mb']} MB anonymous at most; after kill -9 {one['repeated']} "
            f"unit(s) begun again, {one['done_before_kill']} kept"
        )


if __name__ == "__main__":
    main()
