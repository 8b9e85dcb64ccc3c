"""Training on a CPU beside ms-swift 4.6.0: samples a second, start, loader, two ranks.

    python benchmarks/train_cpu.py [--swift PYTHON] [--repeats N] [--json]

Both train the Qwen2.5-VL of `train_work.py` (1 M parameters, all of it unfrozen) in fp32 on one
thread with one loader process, from its start to the end of the command, one after the other:

- same batch: 8 samples of `digits` an optimizer step, ours without packing; ms-swift with gradient
  checkpointing on and off, whichever is faster;
- best: `mixed` as each does best, about 8 samples a step: ours packed, with the defaults of a
  recipe; ms-swift, which packs only with flash-attn and refuses bf16 without a GPU, with 1, 2, 4
  and 8 samples of like length a micro batch, without checkpointing, whichever is fastest.

A rate is samples over wall seconds of the steps after the fifth, the best of the repeats. Without
--swift ours is measured alone. ms-swift wants an environment of its own:

    python3.11 -m venv SWIFT && SWIFT/bin/pip install \
        torch==2.13.0 torchvision==0.28.0 transformers==5.19.0 ms-swift==4.6.0 qwen_vl_utils

then pass `--swift SWIFT/bin/python`, with the same wheel index as for this project's `make setup`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import train_work

from vlmcore import compat
from vlmcore.recipe.train_stage import TrainStage
from vlmcore.training.job import TrainJob

ROOT = Path(__file__).resolve().parents[1]
WARM_UP_STEPS = 5
BATCH = 8
ROW_TOKENS = 3072  # about 8 samples of `mixed`
MIXED_ROWS = 48
SWIFT_MICRO_BATCHES = (1, 2, 4, 8)
Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--swift", type=Path, metavar="PYTHON", help="of ms-swift's environment")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each; the best counts")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), swift=given.swift, repeats=given.repeats)
    if given.json:
        sys.stdout.write(json.dumps(figures) + "\n")
        return
    for name, value in figures.items():
        sys.stdout.write(f"{name}: {value}\n")
    if given.swift is None:
        sys.stdout.write("ms-swift was not measured; --help says how to install it\n")


def measure(folder: Path, *, swift: Path | None, repeats: int) -> Figures:
    prepare(folder)
    runs: list[Figures] = []
    for _ in range(repeats):
        found = ours(folder)
        if swift is not None:
            found |= peer(folder, swift)
        runs.append(found)
    lowest = ("first_step_s", "swift_first_step_s")
    figures = {
        name: (min if name in lowest else max)(run[name] for run in runs) for name in runs[0]
    }
    digits, mixed = figures["digits_samples_per_s"], figures["mixed_samples_per_s"]
    figures["loader_of_need"] = figures["loader_samples_per_s"] / mixed
    figures["weak_scaling"] = figures["two_ranks_samples_per_s"] / digits / 2
    if swift is not None:
        for ratio, name in (("same_batch_ratio", "digits"), ("best_ratio", "mixed")):
            theirs = max(v for key, v in figures.items() if key.startswith(f"swift_{name}_"))
            figures[ratio] = figures[f"{name}_samples_per_s"] / theirs
    return {name: round(value, 3) for name, value in figures.items()}


def prepare(folder: Path) -> None:
    """Model and datasets: rows and pictures for ms-swift, energon datasets for us."""
    compat.install()
    from data_prep.energon import prepare as index
    from data_prep.shards import write_shards

    train_work.write_model(folder / "model")
    for name in train_work.NUM_SAMPLES:
        train_work.write_raw(name, folder / name / "raw")
        raw, shards = folder / name / "raw", folder / name / "shards"
        write_shards(raw, shards, max_bad_ratio=0, num_workers=1)
        index(shards, folder / name / "energon")


def ours(folder: Path) -> Figures:
    unpacked = {"packing": False, "micro_batch_size": BATCH, "max_length": 512, "train_iters": 128}
    same_batch = train(folder, "digits", **unpacked, global_batch_size=BATCH)
    mixed = train(folder, "mixed", max_length=ROW_TOKENS, train_iters=MIXED_ROWS)
    two = train(folder, "digits", **unpacked, global_batch_size=2 * BATCH, nproc_per_node=2)
    return {
        "digits_samples_per_s": same_batch["samples_per_s"],
        "mixed_samples_per_s": mixed["samples_per_s"],
        "mixed_tokens_per_s": mixed["tokens_per_s"],
        "two_ranks_samples_per_s": two["samples_per_s"],
        "first_step_s": same_batch["first_step_s"],
        "packing_fill": mixed["tokens_per_step"] / ROW_TOKENS,
        "loader_samples_per_s": loader_rate(folder),
    }


def stage_of(**fields: object) -> TrainStage:
    common = {"name": "benchmark", "data": ("data",), "torch_dtype": "float32"}
    return TrainStage(**(common | {"learning_rate": 1e-3, "log_interval": 1} | fields))


def train(folder: Path, data: str, **fields: object) -> Figures:
    """Runs our command; every step is timed as its line of progress comes."""
    from vlmcore.training.launch import launch

    stage = stage_of(save_interval=10_000, **fields)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        output, scratch = Path(work) / "output", Path(work) / "scratch"
        output.mkdir()
        scratch.mkdir()
        job = TrainJob(
            stage=stage,
            model_dir=folder / "model",
            datasets={folder / data / "energon": 1.0},
            output_dir=output,
            scratch_dir=scratch,
        )
        (scratch / "job.json").write_text(job.model_dump_json())
        ends, steps = [], []

        def hear(values: dict) -> None:
            if "loss" in values:
                ends.append(time.time())
                steps.append(values)

        began = time.time()
        launch(
            "vlmcore.training.main",
            ["--job", str(scratch / "job.json")],
            nproc_per_node=stage.nproc_per_node,
            log_path=Path(work) / "log",
            on_progress=hear,
        )
    seconds = ends[-1] - ends[WARM_UP_STEPS]
    timed = steps[WARM_UP_STEPS + 1 :]
    return {
        "first_step_s": ends[0] - began,
        "samples_per_s": sum(step["samples"] for step in timed) / seconds,
        "tokens_per_s": sum(step["tokens"] for step in timed) / seconds,
        "tokens_per_step": sum(step["tokens"] for step in steps) / len(steps),
    }


def loader_rate(folder: Path) -> float:
    """Samples a second of the loader alone, packing `mixed` in this process."""
    import torch

    from vlmcore.dataloading.loader import stage_loader, stage_task_encoder

    torch.set_num_threads(1)
    stage = stage_of(max_length=ROW_TOKENS, train_iters=1, dataloader_num_workers=0)
    loader = stage_loader(
        stage,
        (folder / "mixed" / "energon",),
        stage_task_encoder(stage, folder / "model"),
        data_parallel_rank=0,
        data_parallel_size=1,
        blend_file=folder / "blend.yaml",
    )
    rows = iter(loader)
    for _ in islice(rows, WARM_UP_STEPS):
        pass
    began = time.perf_counter()
    samples = sum(row.num_samples for row in islice(rows, 3 * MIXED_ROWS))
    return samples / (time.perf_counter() - began)


def peer(folder: Path, python: Path) -> Figures:
    found = {}
    for name, checkpointing in (("digits_recomputed", "true"), ("digits_kept", "false")):
        run = swift(folder, python, "digits", epochs=2, checkpointing=checkpointing)
        found[f"swift_{name}_samples_per_s"] = run["samples_per_s"]
    found["swift_first_step_s"] = run["first_step_s"]
    for size in SWIFT_MICRO_BATCHES:
        run = swift(folder, python, "mixed", micro_batch_size=size, checkpointing="false")
        found[f"swift_mixed_by_{size}_samples_per_s"] = run["samples_per_s"]
    return found


def swift(
    folder: Path,
    python: Path,
    data: str,
    *,
    checkpointing: str,
    epochs: int = 1,
    micro_batch_size: int = BATCH,
) -> Figures:
    """Runs `swift sft`; its plugin writes when each step ended."""
    clock = folder / "clock"
    clock.unlink(missing_ok=True)
    options = {
        "model": folder / "model", "model_type": "qwen2_5_vl", "template": "qwen2_5_vl",
        "dataset": folder / data / "raw" / "train.jsonl", "split_dataset_ratio": 0,
        "max_length": 2048, "num_train_epochs": epochs, "learning_rate": 1e-3,
        "tuner_type": "full", "freeze_vit": "false", "freeze_llm": "false",
        "freeze_aligner": "false", "torch_dtype": "float32", "attn_impl": "sdpa",
        "per_device_train_batch_size": micro_batch_size,
        "gradient_accumulation_steps": BATCH // micro_batch_size,
        "gradient_checkpointing": checkpointing,
        "group_by_length": "true" if data == "mixed" else "false",
        "save_strategy": "no", "logging_steps": 20, "report_to": "none",
        "output_dir": folder / "swift", "add_version": "false", "check_model": "false",
        "external_plugins": ROOT / "benchmarks" / "swift_plugin.py", "callbacks": "step_clock",
    }  # fmt: skip
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    limits = train_work.PROCESSOR["size"]
    env = os.environ | {
        "PYTHONPATH": f"{compat.SITE}:{ROOT}",  # the remedy for torchvision beside a CPU torch
        "TRAIN_CPU_MODEL": str(folder / "model"), "TRAIN_CPU_CLOCK": str(clock),
        "ROOT_IMAGE_DIR": str(folder / data / "raw"), "HF_HOME": str(folder / "hub"),
        "MODELSCOPE_CACHE": str(folder / "hub"), "USE_HF": "1", "HF_HUB_OFFLINE": "1",
        "MAX_PIXELS": str(limits["longest_edge"]), "MIN_PIXELS": str(limits["shortest_edge"]),
        "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    began = time.time()
    done = subprocess.run(
        [python.with_name("swift"), "sft", *arguments],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"swift sft: exit code {done.returncode}\n{done.stdout[-3000:]}")
    ends = [float(line) for line in clock.read_text().split()]
    timed = len(ends) - WARM_UP_STEPS - 1
    return {
        "first_step_s": ends[0] - began,
        "samples_per_s": BATCH * timed / (ends[-1] - ends[WARM_UP_STEPS]),
    }


if __name__ == "__main__":
    main()
