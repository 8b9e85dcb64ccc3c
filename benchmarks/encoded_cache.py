"""What `cache_encoded_samples` saves, and what it takes: the data loader alone.

    python benchmarks/encoded_cache.py [--json]

Photographs of 1280 x 960 (about 550 KB), clips of 8 s at 640 x 360, and chats of 10 turns, read
once by the loader in one process with one thread: without the cache (`off`), filling it (`cold`),
and from it, with its files in the page cache (`warm`) or on the disk (`warm_disk`). The limits of
sizes are those of the published Qwen3-VL processors.
"""

import argparse
import io
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

NUM_SAMPLES = {"photos": 60, "clips": 12, "chats": 300}
IMAGE_EDGES = {"longest_edge": 16_777_216, "shortest_edge": 65_536}  # pixels, Qwen3-VL-8B-Instruct
VIDEO_EDGES = {"longest_edge": 25_165_824, "shortest_edge": 4_096}
CLIP = {"size": (640, 360), "fps": 30, "num_frames": 240}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = parser.parse_args().json
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder))
    if as_json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name}: {value}")


def measure(folder: Path) -> dict[str, float]:
    import torch

    from vlmcore import compat

    compat.install()
    torch.set_num_threads(1)
    model = model_folder(folder / "model")
    figures: dict[str, float] = {}
    for kind, count in NUM_SAMPLES.items():
        dataset, media_bytes = dataset_of(kind, folder / kind)
        cache = folder / kind / "encoded"
        off = samples_per_s(dataset, model, count, None)
        cold = samples_per_s(dataset, model, count, cache)
        warm = samples_per_s(dataset, model, count, cache)
        entries = [path for path in cache.rglob("*") if path.is_file()]
        forget(entries)
        from_disk = samples_per_s(dataset, model, count, cache)
        figures |= {
            f"{kind}_off_samples_per_s": round(off, 1),
            f"{kind}_cold_samples_per_s": round(cold, 1),
            f"{kind}_warm_samples_per_s": round(warm, 1),
            f"{kind}_warm_disk_samples_per_s": round(from_disk, 1),
            f"{kind}_warm_ratio": round(warm / off, 2),
            f"{kind}_source_kb": round(media_bytes / count / 1e3),
            f"{kind}_kept_kb": round(sum(one.stat().st_size for one in entries) / count / 1e3),
        }
    return figures


def samples_per_s(dataset: Path, model: Path, count: int, cache: Path | None) -> float:
    """Samples a second after the first; the held-out split, of which each comes exactly once."""
    from vlmcore.dataloading.held_out import held_out_rows
    from vlmcore.dataloading.loader import stage_task_encoder
    from vlmcore.recipe.train_stage import TrainStage

    stage = TrainStage(
        name="bench", data=("data",), train_iters=1, max_length=100_000, packing=False
    )
    task_encoder = stage_task_encoder(stage, model, cache_dir=cache)
    rows = held_out_rows(stage, [dataset], task_encoder, data_parallel_rank=0, data_parallel_size=1)
    next(rows)
    began = time.perf_counter()
    assert sum(row.num_samples for row in rows) == count - 1
    return (count - 1) / (time.perf_counter() - began)


def forget(files: list[Path]) -> None:
    """Has the page cache drop them."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def model_folder(folder: Path) -> Path:
    from vlmcore.surgery.donors import fetch_donor

    fetch_donor("builtin:tiny-qwen3-vl", folder, seed=0)
    for name, edges in (("preprocessor", IMAGE_EDGES), ("video_preprocessor", VIDEO_EDGES)):
        path = folder / f"{name}_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"size": edges}))
    return folder


def dataset_of(kind: str, folder: Path) -> tuple[Path, int]:
    """An energon dataset, and the bytes of its media and texts."""
    from data_prep.energon import prepare
    from data_prep.shards import write_shards

    (folder / "raw").mkdir(parents=True)
    rng = np.random.default_rng(0)
    total = 0
    with (folder / "raw" / "val.jsonl").open("w") as file:
        for i in range(NUM_SAMPLES[kind]):
            row: dict = {"messages": turns("<image>?", 1)}
            if kind == "chats":
                row = {"messages": turns(f"What of {i}?", 10)}
            elif kind == "photos":
                (folder / "raw" / f"{i}.jpg").write_bytes(photo(rng))
                row["images"] = [f"{i}.jpg"]
            else:
                write_clip(folder / "raw" / f"{i}.mp4", rng)
                row = {"messages": turns("<video>?", 1), "videos": [f"{i}.mp4"]}
            total += file.write(json.dumps(row) + "\n")
            names = row.get("images", []) + row.get("videos", [])
            total += sum((folder / "raw" / name).stat().st_size for name in names)
    write_shards(folder / "raw", folder / "shards", max_bad_ratio=0, num_workers=1)
    prepare(folder / "shards", folder / "energon")
    return folder / "energon", total


def turns(question: str, count: int) -> list[dict[str, str]]:
    answer = " ".join(["the", "of", "and", "to", "it", "was"] * 10)
    ask = {"role": "user", "content": question}
    again = {"role": "user", "content": "Why is that so, and what follows?"}
    reply = {"role": "assistant", "content": answer}
    return [message for i in range(count) for message in (again if i else ask, reply)]


def scene(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Large smooth shapes: [height, width, 3]."""
    coarse = rng.integers(0, 256, (height // 40, width // 40, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def photo(rng: np.random.Generator) -> bytes:
    """A JPEG with a photograph's grain, so with its size."""
    pixels = scene(rng, 1280, 960) + rng.normal(0, 12, (960, 1280, 1))
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def write_clip(path: Path, rng: np.random.Generator) -> None:
    import cv2

    width, height = CLIP["size"]
    still = scene(rng, width, height)
    grain = rng.integers(0, 8, (height, width, 1), np.uint8)
    fourcc = cv2.VideoWriter.fourcc(*"mp4v")
    writer = cv2.VideoWriter(str(path), fourcc, CLIP["fps"], CLIP["size"])
    for i in range(CLIP["num_frames"]):
        writer.write(np.roll(still, 3 * i, 1) // 2 + np.roll(grain, 7 * i, 0))
    writer.release()


if __name__ == "__main__":
    main()
