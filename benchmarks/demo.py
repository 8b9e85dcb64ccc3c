"""The demo's figures: from nothing, again, and how much memory; `make bench-demo`.

Runs the demo in a new store, twice, and prints what issue-sized promises rest on: wall seconds of
the first and of the fully cached run, of `vlmflow --help`, peak memory of all processes together,
and the scores. `--json` prints one object.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

RECIPE = "handwritten_numbers"


def timed(command: list[str], env: dict[str, str]) -> tuple[float, float, str]:
    """Wall seconds, peak resident MB of the process tree, and standard output."""
    began = time.perf_counter()
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    peak = [0.0]
    watcher = threading.Thread(target=watch, args=(process.pid, peak), daemon=True)
    watcher.start()
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}")
    return time.perf_counter() - began, peak[0], output


def watch(pid: int, peak: list[float]) -> None:
    """Samples the memory of a process and its descendants; shared pages count once (PSS)."""
    while psutil.pid_exists(pid):
        total = 0
        try:
            root = psutil.Process(pid)
            for one in [root, *root.children(recursive=True)]:
                total += proportional_set(one.pid)
        except psutil.NoSuchProcess:
            return
        peak[0] = max(peak[0], total / 1e6)
        time.sleep(2)


def proportional_set(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    line = next(line for line in text.splitlines() if line.startswith("Pss:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    with tempfile.TemporaryDirectory() as folder:
        env = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
        env |= {"PREFECT_HOME": f"{folder}/prefect"}
        vlmflow = [sys.executable, "-m", "flows"]
        help_s, _, _ = timed([*vlmflow, "--help"], env)
        run = [*vlmflow, "run", RECIPE, "--store", f"{folder}/store", "--json"]
        first_s, peak_mb, printed = timed(run, env)
        cached_s, _, again = timed(run, env)
    first = json.loads(printed)
    figures = {
        "first_run_s": round(first_s, 1),
        "cached_run_s": round(cached_s, 2),
        "help_s": round(help_s, 2),
        "peak_memory_mb": round(peak_mb),
        "stages_run_again": sum(s["state"] == "ran" for s in json.loads(again)["stages"]),
        "scores": first["scores"],
        "slowest_stages_s": {
            s["name"]: s["seconds"]
            for s in sorted(first["stages"], key=lambda s: -s["seconds"])[:8]
        },
    }
    if as_json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
