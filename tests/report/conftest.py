"""A finished run as the stages leave it: real artifacts in a real store, real digit images."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.audit import audit_shards
from data_prep.audit_page import describe
from data_prep.holdout import write_holdout
from data_prep.shards import write_shards
from data_prep.sources import fetch
from vlmcore.artifacts import ArtifactRef, StageSpec, Store
from vlmcore.evaluation.gates import GateResult
from vlmcore.report import ReportInput

CHECKPOINTS = ["swap", "align", "full"]
RIGHT_SHARE = {"swap": 0.05, "align": 0.6, "full": 0.9}
RECIPE = """\
name: handwritten-numbers
model: {vlm: "builtin:tiny-qwen3-vl", llm: "builtin:tiny-qwen3"}  # <donors>
train:
  - {name: align, data: [numbers], freeze_vit: true, freeze_llm: true, learning_rate: 2.0e-3}
  - {name: full, data: [numbers], learning_rate: 1.0e-3}
gates: ["holdout.exact_match >= 0.9"]
"""
SWAP_PROOF = {
    "text_logits_max_diff": 0.0,
    "vision_max_diff": 0.0,
    "missing_keys": [],
    "unexpected_keys": [],
    "text_class": "Qwen3VLTextModel",
    "vision_class": "Qwen3VLVisionModel",
    "ledger": {
        "from_llm": 46,
        "from_vlm": 56,
        "fresh": {"model.visual.merger.linear_fc2.weight": "the hidden size differs"},
    },
}


def input_name(stage: str) -> str:
    """How a stage's builder calls an artifact that it reads."""
    return "holdout" if stage.endswith(".holdout") else stage.partition(".")[0]


PRECISION = [
    {
        "tensor_model_parallel_size": size,
        "sample": sample,
        "num_tokens": 12 + 9 * row,
        "max_diff": 4.77e-7 * (size - 1 + row),
        "mean_diff": 3e-8 * (size - 1 + row),
        "top1_agreement": 1.0,
        "tolerance": 1e-4,
        "passed": True,
    }
    for size in (1, 2)
    for row, sample in enumerate(("text", "one image", "two images of different size"))
]
TRAINABLE = {
    "aligner": {"parameters": 123_456, "trainable": 123_456},
    "llm": {"parameters": 1_234_567, "trainable": 0},
    "vit": {"parameters": 345_678, "trainable": 0},
}

SECONDS = {"train": 61.0, "evaluate": 34.2, "to_mcore": 11.7, "swap": 4.1}

Build = Callable[[Path], object]


class Run:
    """Publishes stages one after the other and keeps what a report is made from.

    `change(stage, folder)` may edit what a stage is about to publish.
    """

    def __init__(self, root: Path, change: Callable[[str, Path], None]) -> None:
        self.store = Store(root)
        self.change = change
        self.folders: dict[str, Path] = {}
        self.refs: dict[str, ArtifactRef] = {}

    def stage(self, name: str, build: Build, *inputs: str, **params) -> None:
        def builder(context) -> None:
            build(context.path)
            self.change(name, context.path)

        spec = StageSpec(
            name,
            kind=name.partition(".")[0],
            version=1,
            params=params,
            inputs={input_name(one): self.refs[one] for one in inputs},
            volatile=("metrics.jsonl",),
        )
        self.refs[name] = self.store.build(spec, builder).ref
        self.folders[name] = self.refs[name].path

    def report(self, **changed) -> ReportInput:
        records = self.store.records()
        values = {
            "name": "handwritten-numbers",
            "recipe": RECIPE,
            # as long as in a real run, and the same each time
            "records": [
                one.model_copy(update={"seconds": SECONDS.get(one.kind, 2.5)}) for one in records
            ],
            "folders": self.folders,
            "scores": {name: {"holdout.exact_match": RIGHT_SHARE[name]} for name in CHECKPOINTS},
            "gates": [GateResult("holdout.exact_match >= 0.9", 0.9, passed=True)],
            "checkpoints": CHECKPOINTS,
        }
        return ReportInput(**values | changed)


def write(files: dict[str, object]) -> Build:
    """A builder that leaves JSON files, or JSON lines where the name says so."""

    def build(folder: Path) -> None:
        for name, content in files.items():
            lines = content if name.endswith(".jsonl") else [content]
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))

    return build


def training_steps(count: int, *, start: float, floor: float, peak: float, seed: int) -> list[dict]:
    noise = random.Random(seed)

    def step(number: int) -> dict:
        decay = math.exp(-5 * number / count) * noise.uniform(0.8, 1.2)
        cosine = (1 + math.cos(math.pi * number / count)) / 2
        return {
            "step": number,
            "loss": floor + (start - floor) * decay,
            "learning_rate": peak * min(1, number / (0.05 * count)) * cosine,
            "grad_norm": noise.uniform(0.2, 2),
            "tokens": 1000 + number % 17,
            "samples": 32,
            "packing_fill": 0.97 + number / count / 100,
            "tokens_per_s": noise.uniform(9000, 11000),
            "samples_per_s": 320 - number / 10,
            "tflops_per_rank": 0.02 + number / 1e5,
            "step_s": 0.1,
            "largest_rank_memory_mb": 1200 + number / 10,
            "data_s": 0.004,
        }

    return [step(number) for number in range(1, count + 1)]


def answer_all(holdout: Path, *, right_share: float, seed: int) -> list[dict]:
    rows = [json.loads(line) for line in (holdout / "holdout.jsonl").read_text().splitlines()]
    right = set(random.Random(seed).sample(range(len(rows)), round(right_share * len(rows))))
    for index, row in enumerate(rows):
        wrong = row["answer"][:-1] + str((int(row["answer"][-1]) + 3) % 10)
        row["prediction"] = row["answer"] if index in right else wrong
        row["correct"] = index in right
    return rows


def conversion(read: int, written: int, **more) -> dict:
    base = {"family": "qwen3_vl", "keys_read": read, "keys_written": written, "digest": "5eed" * 16}
    return base | {"tied": {}, "dropped": {}, "tensors": {}} | more


def build_data(run: Run, name: str, **options: int) -> None:
    raw, source = f"data.{name}.raw", "builtin:handwritten_numbers"
    shards = f"data.{name}.shards"
    run.stage(raw, lambda folder: fetch(source, folder, options=options, seed=1), **options)
    run.stage(
        shards,
        lambda folder: write_shards(run.folders[raw], folder, max_bad_ratio=0, num_workers=1),
        raw,
    )
    run.stage(f"data.{name}.energon", write({"split.json": {}}), shards)
    audit = describe(audit_shards(run.folders[shards]))
    run.stage(f"data.{name}.audit", write({"audit.json": audit}), shards)


def build_donors(run: Run) -> None:
    run.stage("donor.vlm", write({"config.json": "qwen3_vl"}), donor="builtin:tiny-qwen3-vl")
    run.stage("donor.llm", write({"config.json": "qwen3"}), donor="builtin:tiny-qwen3")
    to_mcore, back = conversion(46, 32, family="qwen3"), conversion(32, 46, family="qwen3")
    run.stage("to_mcore.llm", write({"conversion.json": to_mcore}), "donor.llm")
    files = {
        "metrics.jsonl": training_steps(100, start=3.0, floor=0.02, peak=3e-3, seed=1),
        "trainable.json": {"llm": {"parameters": 1_234_567, "trainable": 1_234_567}},
    }
    run.stage("train.words", write(files), "to_mcore.llm", "data.words.energon", task="pt")
    run.stage("export.words", write({"conversion.json": back}), "train.words")


def build_model(run: Run) -> None:
    run.stage("swap", write({"proof.json": SWAP_PROOF}), "donor.vlm", "export.words", seed=1234)
    tied = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    files = {"conversion.json": conversion(103, 81, tied=tied), "precision.json": PRECISION}
    base = "to_mcore"
    run.stage(base, write(files), "swap", tolerance=1e-4)
    for seed, name in enumerate(("align", "full"), start=2):
        rows = training_steps(300, start=5 / seed, floor=0.3 / seed**2, peak=2e-3, seed=seed)
        files = {"metrics.jsonl": rows, "trainable.json": TRAINABLE, "weights.json": name}
        run.stage(f"train.{name}", write(files), base, "data.numbers.energon", learning_rate=2e-3)
        base = f"train.{name}"
        files = {"conversion.json": conversion(81, 102), "precision.json": PRECISION[:3]}
        run.stage(f"export.{name}", write(files), base)


def build_scores(run: Run) -> None:
    holdout, raw = "data.numbers.holdout", "data.numbers.raw"
    run.stage(holdout, lambda folder: write_holdout(run.folders[raw], folder), raw)
    for seed, name in enumerate(CHECKPOINTS):
        answers = answer_all(run.folders[holdout], right_share=RIGHT_SHARE[name], seed=seed)
        model = "swap" if name == "swap" else f"export.{name}"
        files = {"predictions.jsonl": answers}
        run.stage(f"evaluate.{name}.holdout", write(files), model, holdout)


def leave_as_is(stage: str, folder: Path) -> None:
    """What a run without a fault needs."""


@pytest.fixture(scope="session")
def build_run(tmp_path_factory) -> Callable[..., Run]:
    """Builds the demo's stages at a small size: `build_run(change=…)`."""

    def build(change: Callable[[str, Path], None] = leave_as_is) -> Run:
        run = Run(tmp_path_factory.mktemp("run") / "store", change)
        build_data(run, "words", train=20, val=0, test=0)
        build_data(run, "numbers", train=40, val=6, test=60)
        build_donors(run)
        build_model(run)
        build_scores(run)
        return run

    return build


@pytest.fixture(scope="session")
def run(build_run) -> Run:
    """A run without a fault, for reading only."""
    return build_run()
