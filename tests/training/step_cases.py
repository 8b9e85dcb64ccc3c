"""On two ranks: one optimizer step of the megatron engine beside plain transformers and AdamW, for
each model, layout and freeze; arguments: JSON of models by name, JSON file of the results.

The reference runs each sample alone, so what is equal to it is also packing, and the division by
the trained tokens of all ranks and micro batches.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.tiny.megatron import stage, under_training
from tests.tiny.rows import row_of, token_sample
from vlmcore.dataloading.encode import IGNORED, ConversationEncoder
from vlmcore.dataloading.samples import TokenSample
from vlmcore.families import family_of, read_config
from vlmcore.models.build import save_weights
from vlmcore.recipe.schema import TrainStage
from vlmcore.training.distributed import layout_of, model_parallel, process_group
from vlmcore.training.step import train_step
from vlmcore.weights.convert import CHECKPOINT, SIDECAR, copy_sidecar, to_hf

# Two choices keep Adam's first step from hiding faults: it ignores a gradient's scale (and turns
# the noise of a gradient that is zero by symmetry into a full step) unless epsilon is about as
# large as the gradients, and the norm must be far above clip_grad for clipping to show.
HYPER = {"adam_eps": 1e-2, "clip_grad": 0.5, "weight_decay": 0.1, "learning_rate": 0.1}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2_sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
}
ALIGNER_ONLY = {"freeze_vit": True, "freeze_llm": True}


def samples_of(encoder: ConversationEncoder) -> list[list[TokenSample]]:
    """The samples of two rows: uneven ones, so that a mean of means would show."""
    text = token_sample(encoder, "What is 12 + 30?", "42", "And half of it?", "21", images=[])
    short = token_sample(encoder, "Hi", "Hello, what can I do for you?", images=[])
    if encoder.family.vision is None:
        return [[text, short], [short]]
    one = token_sample(encoder, "Read.", "7", images=[(96, 64)])
    two = token_sample(encoder, "Compare them.", "Not alike.", images=[(64, 64), (128, 32)])
    return [[text, two, one], [short]]  # the second data parallel rank sees no image


def reference(hf_dir: Path, rows: list[list[TokenSample]], stage: TrainStage) -> dict[str, Any]:
    """Loss, gradient norm and updated weights of plain transformers and torch's AdamW."""
    import transformers

    family = family_of(read_config(hf_dir))
    model = getattr(transformers, family.architecture).from_pretrained(hf_dir, dtype=torch.float32)
    frozen = {"vit": stage.freeze_vit, "aligner": stage.freeze_aligner, "llm": stage.freeze_llm}
    for name, weight in model.named_parameters():
        weight.requires_grad_(not frozen[family.group_of(name)])
    samples = [sample for row in rows for sample in row]
    total = sum(int((sample.labels != IGNORED).sum()) for sample in samples)
    loss = sum(_loss_sum(model, sample) for sample in samples) / total
    loss.backward()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(trained, stage.clip_grad)
    torch.optim.AdamW(
        [
            {"params": [w for w in trained if w.ndim > 1], "weight_decay": stage.weight_decay},
            {"params": [w for w in trained if w.ndim == 1], "weight_decay": 0.0},
        ],
        lr=stage.learning_rate,
        betas=(stage.adam_beta1, stage.adam_beta2),
        eps=stage.adam_eps,
    ).step()
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    return {"loss": loss.item(), "grad_norm": float(norm), "weights": weights}


def _loss_sum(model: Any, sample: TokenSample) -> torch.Tensor:
    ids = sample.input_ids[None]
    extra: dict[str, Any] = {}
    if sample.pixel_values is not None:
        extra = {
            "pixel_values": sample.pixel_values,
            "image_grid_thw": sample.image_grid_thw,
            "mm_token_type_ids": (ids == model.config.image_token_id).int(),
        }
    logits = model(input_ids=ids, **extra).logits[0]
    return F.cross_entropy(logits, sample.labels, ignore_index=IGNORED, reduction="sum")


def megatron_step(
    mcore_dir: Path, rows: list[list[TokenSample]], stage: TrainStage, out: Path
) -> dict[str, Any]:
    """The same figures from the megatron engine, its weights by way of an export."""
    size = stage.tensor_model_parallel_size
    with model_parallel(layout_of(stage), seed=0):
        model, optimizer = under_training(mcore_dir, stage)
        multiple = size if stage.sequence_parallel else 1
        batch = [row_of(samples, multiple=multiple) for samples in rows]
        outcome = train_step(model, optimizer, batch if size > 1 else [batch[dist.get_rank()]])
        save_weights([model.module], out / CHECKPOINT)
    weights = {}
    if dist.get_rank() == 0:
        copy_sidecar(mcore_dir / SIDECAR, out / SIDECAR)
        to_hf(out, out / "export")
        weights = load_file(out / "export" / "model.safetensors")
        shutil.rmtree(out)
    dist.barrier()
    return outcome | {"weights": weights}


def compare(before: dict, expected: dict, found: dict) -> dict[str, Any]:
    """Figures of one case; weight errors are relative to the largest weight of the tensor."""
    errors, moved = {}, []
    for key, weight in found["weights"].items():
        wanted = expected["weights"][key]
        errors[key] = float((weight - wanted).abs().max() / wanted.abs().max())
        if not torch.equal(weight, before[key]):
            moved.append(key)
    worst = max(errors, key=errors.__getitem__)
    return {
        "loss": abs(found["loss"] - expected["loss"]),
        "grad_norm": abs(found["grad_norm"] / expected["grad_norm"] - 1),
        "clipped": expected["grad_norm"] > HYPER["clip_grad"],
        "keys": len(errors),
        "worst": [worst, errors[worst]],
        "moved": moved,
    }


def main(models: dict[str, list[str]], out: Path) -> None:
    results = {}
    for name, (hf, mcore) in models.items():
        rows = samples_of(ConversationEncoder(Path(hf), task="sft"))
        before = load_file(Path(hf) / "model.safetensors")
        freezes: list[tuple[str, dict[str, Any]]] = [("all", {})]
        if family_of(read_config(Path(hf))).vision is not None:
            freezes.append(("aligner", ALIGNER_ONLY))
        for trained, freeze in freezes:
            expected = reference(Path(hf), rows, stage(**HYPER, **freeze))
            for layout, fields in LAYOUTS.items():
                case = f"{name} {trained} {layout}"
                folder = out.parent / case.replace(" ", "_")
                found = megatron_step(Path(mcore), rows, stage(**HYPER, **freeze, **fields), folder)
                if dist.get_rank() == 0:
                    results[case] = compare(before, expected, found)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(results))


if __name__ == "__main__":
    with process_group(num_threads=1):
        main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
