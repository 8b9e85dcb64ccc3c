"""Training on one GPU at the shapes of real models, beside plain transformers on the same samples.

    python -m benchmarks.train_gpu [--json] [--models qwen2.5-vl-3b qwen3-vl-8b]
    python -m benchmarks.train_gpu --cpu-smoke      does it run at all, on tiny shapes without a GPU

Random bf16 weights. A step is four rows of 8,192 tokens, packed from samples of a picture of 256
image tokens and 60 to 1,800 tokens of text; plain transformers takes the same samples four at a
time, padded to the longest. `align` trains the merger, `full` everything, `lora` adapters of rank 8
in the language model; both systems recompute activations. Times are means over steps after two that
warm up; tokens are those of samples, without padding; MFU counts the language model's work alone
(`vlmcore.training.throughput`), for both systems alike. A run that does not fit says so.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmcore import compat, proc
from vlmcore.recipe.train_stage import TrainStage

MODELS = ("qwen2.5-vl-3b", "qwen3-vl-8b")
TUNERS = ("align", "full", "lora")
SYSTEMS = ("vlmflow", "transformers")
PADDED_TOGETHER = 4  # samples that plain transformers takes at once
FRAMES_OF_A_PATCH = 2  # of both models
LORA_RANK = 8


@dataclass(frozen=True)
class Work:
    """What a run computes."""

    max_length: int
    rows: int
    steps: int
    image_side: int  # image tokens
    words: tuple[int, int]  # about six tokens each
    warm_up: int
    dtype: str


REAL = Work(8192, 4, steps=5, image_side=16, words=(10, 300), warm_up=2, dtype="bfloat16")
SMOKE = Work(256, 2, steps=1, image_side=2, words=(1, 10), warm_up=0, dtype="float32")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tuners", nargs="+", choices=TUNERS, default=list(TUNERS))
    parser.add_argument("--cpu-smoke", action="store_true", help="tiny shapes, no GPU needed")
    parser.add_argument("--one", nargs=3, metavar=("SYSTEM", "TUNER", "FOLDER"),
                        help=argparse.SUPPRESS)  # fmt: skip
    parser.add_argument("--build", nargs=2, metavar=("MODEL", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work = SMOKE if arguments.cpu_smoke else REAL
    if arguments.one:
        system, tuner, folder = arguments.one
        sys.stdout.write(json.dumps(measure(system, tuner, Path(folder), work)) + "\n")
    elif arguments.build:
        build(arguments.build[0], Path(arguments.build[1]), tiny=arguments.cpu_smoke)
    else:
        report(figures(arguments.models, arguments.tuners, arguments.cpu_smoke), arguments.json)


def figures(models: Sequence[str], tuners: Sequence[str], smoke: bool) -> dict[str, Any]:
    """{model: {tuner: {system: figures}}}; each run has a process and so the GPU of its own."""
    found: dict[str, Any] = {"device": device_name(), "command": " ".join(sys.argv)}
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            _run(["--build", model, folder], smoke)
            found[model] = {
                tuner: {
                    system: json.loads(_run(["--one", system, tuner, folder], smoke))
                    for system in SYSTEMS
                }
                for tuner in tuners
            }
    return found


def _run(arguments: list[str], smoke: bool) -> str:
    command = [sys.executable, "-m", "benchmarks.train_gpu", *arguments]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        command + ["--cpu-smoke"] * smoke,
        env=compat.child_env() | alone | {"MASTER_PORT": str(proc.free_port())},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return (done.stdout.splitlines() or [""])[-1]


def report(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(found) + "\n")
        return
    sys.stdout.write(f"{found.pop('device')}: {found.pop('command')}\n")
    for model, tuners in found.items():
        for tuner, systems in tuners.items():
            for system, row in systems.items():
                text = row.get("error") or "  ".join(f"{k} {v:.4g}" for k, v in row.items())
                sys.stdout.write(f"{model:14} {tuner:6} {system:13} {text}\n")


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def build(model: str, folder: Path, *, tiny: bool) -> None:
    """A model folder of random weights, with a tokenizer and processor of a few hundred tokens."""
    compat.install()
    import torch
    import transformers

    from tests.fixtures.real import real_model
    from tests.tiny.models import BUILDERS
    from tests.tiny.processors import QWEN_TOKENS, save_qwen_processor

    real = real_model(model)
    if tiny:
        BUILDERS[real.config["model_type"]](folder)
        return
    is_qwen3 = real.config["model_type"] == "qwen3_vl"
    tokenizer = save_qwen_processor(
        folder,
        "Qwen3VLProcessor" if is_qwen3 else "Qwen2_5_VLProcessor",
        seed=0,
        patch_size=real.config["vision_config"]["patch_size"],
        video_processor="Qwen3VLVideoProcessor" if is_qwen3 else "Qwen2VLVideoProcessor",
    )
    ids = {field: tokenizer.convert_tokens_to_ids(name) for field, name in QWEN_TOKENS.items()}
    fields = real.saved_config | ids
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        built = getattr(transformers, real.config["architectures"][0])(config)
    built.save_pretrained(folder)


def samples(folder: Path, work: Work) -> list[list[Any]]:
    """Encoded samples of a step's rows, each row as full as they let it be."""
    from tests.tiny.rows import token_sample
    from vlmcore.dataloading.encode import ConversationEncoder

    encoder, draw = ConversationEncoder(folder, task="sft"), random.Random(0)
    rows: list[list[Any]] = [[] for _ in range(work.rows)]
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    side_px = work.image_side * vision["patch_size"] * vision["spatial_merge_size"]
    for row in rows:
        held = 0
        while True:
            words = ["seven"] * draw.randint(*work.words)
            images = [(side_px, side_px)]
            sample = token_sample(encoder, "Describe it.", " ".join(words), images=images)
            if held + len(sample.input_ids) > work.max_length:
                break
            held += len(sample.input_ids)
            row.append(sample)
    return rows


def measure(system: str, tuner: str, folder: Path, work: Work) -> dict[str, Any]:
    """Figures of one system on one tuner, or the error that ended it."""
    compat.install()
    import torch

    from vlmcore.families import family_of, read_config
    from vlmcore.training.throughput import Throughput, peak_tflops

    stage = stage_of(tuner, work)
    run = {"vlmflow": with_vlmflow, "transformers": with_transformers}[system]
    try:
        seconds, counts, loss = run(folder, stage, samples(folder, work), work)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    config = read_config(folder)
    flops = Throughput(family_of(config).language_model(config), stage).flops(counts)
    found = {
        "tokens_per_s": counts["tokens"] / seconds,
        "step_s": seconds,
        "tflops": flops / seconds / 1e12,
        "loss": loss,
    }
    if torch.cuda.is_available():
        found["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if peak := peak_tflops():
            found["mfu"] = found["tflops"] / peak
    return found


def stage_of(tuner: str, work: Work) -> TrainStage:
    freezes = {"freeze_vit": True, "freeze_llm": True} if tuner == "align" else {}
    return TrainStage(
        name=tuner,
        data=("none",),
        train_iters=work.warm_up + work.steps,
        max_length=work.max_length,
        global_batch_size=work.rows,
        torch_dtype=work.dtype,
        tuner_type="lora" if tuner == "lora" else "full",
        lora_rank=LORA_RANK,
        lora_alpha=32,
        recompute_granularity="full",
        vit_gradient_checkpointing=True,
        **freezes,
    )


Outcome = tuple[float, dict[str, int], float]


def with_vlmflow(folder: Path, stage: TrainStage, rows: list[list[Any]], work: Work) -> Outcome:
    """Seconds a step, its counts, the last loss."""
    from tests.tiny.rows import row_of
    from vlmcore.training.distributed import model_parallel, process_group
    from vlmcore.training.model import prepare

    with process_group(num_threads=os.cpu_count() or 1), model_parallel(stage.layout, seed=0):
        training = prepare(stage, folder)
        batch = [row_of(row) for row in rows]
        seconds, outcome = timed(lambda: training.step(batch), work)
    return seconds, outcome, outcome["loss"]


def with_transformers(
    folder: Path, stage: TrainStage, rows: list[list[Any]], work: Work
) -> Outcome:
    """The same of transformers, peft and torch's AdamW, each batch padded to its longest sample."""
    import torch
    import transformers

    from vlmcore.families import family_of, read_config

    family = family_of(read_config(folder))
    place = "cuda" if torch.cuda.is_available() else "cpu"
    model = getattr(transformers, family.architecture).from_pretrained(folder, dtype=work.dtype)
    model.to(place).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if stage.tuner_type == "lora":
        model = adapted(model)
    for name, weight in model.named_parameters():
        group = family.group_of(name.removeprefix("base_model.model."))
        is_frozen = {"vit": stage.freeze_vit, "llm": stage.freeze_llm, "aligner": False}[group]
        weight.requires_grad_("lora_" in name if stage.tuner_type == "lora" else not is_frozen)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=stage.learning_rate, fused=True)
    flat = [sample for row in rows for sample in row]
    batches = [flat[i : i + PADDED_TOGETHER] for i in range(0, len(flat), PADDED_TOGETHER)]
    counts = counts_of(flat)

    def step() -> float:
        total = 0.0
        for batch in batches:
            inputs = padded(batch, model.config.image_token_id, place)
            loss = model(**inputs, num_items_in_batch=counts["loss_tokens"], use_cache=False).loss
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, stage.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total)

    seconds, loss = timed(step, work)
    return seconds, counts, loss


def adapted(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    names = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    target = rf".*language_model.*\.({names})"
    model.enable_input_require_grads()  # else checkpointed layers behind frozen ones get none
    return get_peft_model(model, LoraConfig(r=LORA_RANK, lora_alpha=32, target_modules=target))


def padded(batch: list[Any], image_token_id: int, place: str) -> dict[str, Any]:
    import torch
    from torch.nn.utils.rnn import pad_sequence

    def joined(parts: list[Any], fill: int) -> Any:
        return pad_sequence(parts, batch_first=True, padding_value=fill).to(place)

    ids = joined([sample.input_ids for sample in batch], 0)
    # transformers shifts labels itself
    labels = [torch.cat([sample.labels[:1] * 0 - 100, sample.labels[:-1]]) for sample in batch]
    vision = {
        name: torch.cat([sample.vision[name] for sample in batch]).to(place)
        for name in batch[0].vision
    }
    # our rows hold an image once, transformers' model wants it in each frame of a patch
    frame = vision["pixel_values"].unflatten(1, (3, 1, -1))
    vision["pixel_values"] = frame.expand(-1, -1, FRAMES_OF_A_PATCH, -1).flatten(1)
    return {
        "input_ids": ids,
        "attention_mask": joined([torch.ones_like(sample.input_ids) for sample in batch], 0),
        "labels": joined(labels, -100),
        "mm_token_type_ids": (ids == image_token_id).int(),
        **vision,
    }


def counts_of(flat: list[Any]) -> dict[str, int]:
    """As a packed row counts them."""
    lengths = [len(sample.input_ids) for sample in flat]
    return {
        "tokens": sum(lengths),
        "loss_tokens": sum(int((sample.labels >= 0).sum()) for sample in flat),
        "attended_pairs": sum(length * (length + 1) // 2 for length in lengths),
    }


def timed(step: Callable[[], Any], work: Work) -> tuple[float, Any]:
    """Mean seconds of a step after the warm-up, and what the last one returned."""
    import torch

    for _ in range(work.warm_up):
        step()
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began = time.perf_counter()
    for _ in range(work.steps):
        outcome = step()
    wait()
    return (time.perf_counter() - began) / work.steps, outcome


if __name__ == "__main__":
    main()
