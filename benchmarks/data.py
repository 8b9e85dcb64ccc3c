"""The data path's figures, each beside what it is measured against; `--json` prints one object.

shards_vs_tar                  throughput of shards with every check on, over that of `tar` of
                               the same files (JPEG pictures of about 50 KB), in the same run;
                               beside both a plain loop of one process that decodes each image
                               and encodes it again
prepare_5000_s                 5,000 handwriting samples, from JSONL to a prepared energon
                               dataset, in a new process: imports included
peak_mb_1m_rows                a million rows of text to a prepared dataset: most memory of all
                               processes together (PSS)
loader_samples_per_s_per_core  the training loader on those handwriting samples: read, tokenise,
                               pack and decode in one process with one thread
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from itertools import islice
from pathlib import Path

import psutil

NUM_PICTURES = 12_000
NUM_REENCODED = 600
NUM_ROWS = 1_000_000
NUM_HANDWRITING = 5_000
NUM_WORKERS = os.cpu_count() or 1
ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--dir", type=Path, help="where to write; default: the temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        figures = {
            **bench_shards(Path(folder)),
            **bench_prepare(Path(folder)),
            **bench_memory(Path(folder)),
        }
    if arguments.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name}: {value}")


def bench_shards(folder: Path, rounds: int = 5) -> dict:
    from data_prep.shards import write_shards

    raw = folder / "pictures"
    size_mb = make_pictures(raw) / 1e6
    tar_s, shards_s = [], []
    for i in range(rounds):
        # in turns, so that both meet the same state of the machine
        began = time.perf_counter()
        subprocess.run(["tar", "cf", str(folder / "all.tar"), "-C", str(raw), "."], check=True)
        tar_s.append(time.perf_counter() - began)
        (folder / "all.tar").unlink()
        began = time.perf_counter()
        write_shards(
            raw,
            folder / f"shards{i}",
            max_bad_ratio=0,
            num_workers=NUM_WORKERS,
            max_samples_per_shard=NUM_PICTURES // 12,
        )
        shards_s.append(time.perf_counter() - began)
        for tar in (folder / f"shards{i}").glob("*.tar"):
            tar.unlink()
    loop_s = reencode(raw, folder / "again.tar") * NUM_PICTURES / NUM_REENCODED
    rates = {
        "tar_mb_per_s": size_mb / statistics.median(tar_s),
        "shards_mb_per_s": size_mb / statistics.median(shards_s),
        "reencode_loop_mb_per_s": size_mb / loop_s,
    }
    # of the two that followed each other: a machine is not equally busy all the time
    ratio = statistics.median(tar / ours for tar, ours in zip(tar_s, shards_s, strict=True))
    return {"shards_vs_tar": round(ratio, 3)} | {k: round(v, 1) for k, v in rates.items()}


def make_pictures(raw: Path) -> int:
    """Pictures and their rows; bytes altogether."""
    import numpy as np
    from PIL import Image

    (raw / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(24):
        coarse = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((512, 384), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = (smooth + rng.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
        out = io.BytesIO()
        Image.fromarray(noisy).save(out, "JPEG", quality=80)
        encoded.append(out.getvalue())
    total = 0
    with (raw / "train.jsonl").open("w") as file:
        for i in range(NUM_PICTURES):
            name, data = f"images/{i:06d}.jpg", encoded[i % len(encoded)]
            total += (raw / name).write_bytes(data)
            turns = [
                {"role": "user", "content": "<image>\nWhat is it?"},
                {"role": "assistant", "content": f"Picture number {i}."},
            ]
            file.write(json.dumps({"messages": turns, "images": [name]}) + "\n")
    return total


def reencode(raw: Path, dest: Path) -> float:
    """Seconds of the plain loop over the first pictures."""
    from PIL import Image

    began = time.perf_counter()
    with tarfile.open(dest, "w") as tar, (raw / "train.jsonl").open() as rows:
        for line in islice(rows, NUM_REENCODED):
            row = json.loads(line)
            out = io.BytesIO()
            Image.open(raw / row["images"][0]).convert("RGB").save(out, "JPEG", quality=90)
            info = tarfile.TarInfo(row["images"][0])
            info.size = len(out.getvalue())
            tar.addfile(info, io.BytesIO(out.getvalue()))
    return time.perf_counter() - began


PREPARE = """
import sys
from pathlib import Path
from data_prep.energon import prepare
from data_prep.shards import write_shards
if __name__ == "__main__":
    raw, dest = map(Path, sys.argv[1:3])
    write_shards(raw, dest / "shards", max_bad_ratio=0, num_workers=int(sys.argv[3]))
    prepare(dest / "shards", dest / "energon")
"""


def bench_prepare(folder: Path) -> dict:
    from data_prep.sources import fetch

    raw, counts = folder / "handwriting", {"train": NUM_HANDWRITING - 200, "val": 100, "test": 100}
    fetch("builtin:handwritten_numbers", raw, options=counts, seed=0)
    seconds = []
    for i in range(3):
        began = time.perf_counter()
        run_prepare(raw, folder / f"prepared{i}")
        seconds.append(time.perf_counter() - began)
    rate = loader_rate(folder / "prepared0" / "energon", folder)
    return {
        "prepare_5000_s": round(statistics.median(seconds), 2),
        "loader_samples_per_s_per_core": round(rate),
    }


def loader_rate(dataset: Path, folder: Path) -> float:
    """Samples a second of processor time; what is read before that warms up."""
    import torch

    from vlmcore.dataloading.encode import ConversationEncoder
    from vlmcore.dataloading.loader import train_loader
    from vlmcore.dataloading.task_encoder import ConversationTaskEncoder
    from vlmcore.surgery.donors import fetch_donor

    torch.set_num_threads(1)
    model = folder / "model"
    fetch_donor("builtin:tiny-qwen3-vl", model, seed=0)
    loader = train_loader(
        {dataset: 1.0},
        ConversationTaskEncoder(ConversationEncoder(model, task="sft"), max_length=384),
        micro_batch_size=1,
        packing_buffer_size=256,
        seed=0,
        data_parallel_rank=0,
        data_parallel_size=1,
        blend_file=folder / "blend.yaml",
    )
    rows = iter(loader)
    for row in rows:
        if row.num_samples:
            break
    half = NUM_HANDWRITING // 2
    for want in (half, 2 * half):
        began, done = time.process_time(), 0
        while done < want:
            done += next(rows).num_samples
    return done / (time.process_time() - began)


def bench_memory(folder: Path) -> dict:
    raw = folder / "rows"
    raw.mkdir()
    with (raw / "train.jsonl").open("w") as file:
        for i in range(NUM_ROWS):
            turns = [
                {"role": "user", "content": f"What is {i} times {i % 97}?"},
                {"role": "assistant", "content": f"{i * (i % 97)}"},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    began = time.perf_counter()
    peak_mb = run_prepare(raw, folder / "million")
    return {
        "peak_mb_1m_rows": round(peak_mb),
        "seconds_1m_rows": round(time.perf_counter() - began, 1),
    }


def run_prepare(raw: Path, dest: Path) -> float:
    """Prepare a dataset in a process; most memory that it and its children held together, in MB."""
    dest.mkdir()
    code = dest / "prepare.py"
    code.write_text(PREPARE)
    command = [sys.executable, str(code), str(raw), str(dest), str(NUM_WORKERS)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    peak = [0.0]
    watcher = threading.Thread(target=watch, args=(process.pid, peak), daemon=True)
    watcher.start()
    if process.wait():
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}")
    return peak[0]


def watch(pid: int, peak: list[float]) -> None:
    while psutil.pid_exists(pid):
        try:
            root = psutil.Process(pid)
            tree = [root, *root.children(recursive=True)]
            peak[0] = max(peak[0], sum(proportional_set(one.pid) for one in tree) / 1e6)
        except psutil.NoSuchProcess:
            return
        time.sleep(0.25)


def proportional_set(pid: int) -> int:
    """Bytes of a process; of a page that several share, its part."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next(
        (int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:")), 0
    )


if __name__ == "__main__":
    main()
