"""On four ranks: one optimizer step of the megatron engine beside plain transformers and AdamW, for
each model, layout and freeze; arguments: JSON of models by name, JSON file of the results.

The reference runs each sample alone, so what is equal to it is also packing, and the division by
the trained tokens of all ranks and micro batches.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from safetensors.torch import load_file

from tests.tiny.adapters import hf_model, with_adapter
from tests.tiny.megatron import prepared, stage
from tests.tiny.rows import row_of, token_sample, transformers_inputs
from vlmcore.dataloading.encode import IGNORED, ConversationEncoder, dummy_vision_inputs
from vlmcore.dataloading.samples import PackedRow, TokenSample
from vlmcore.families import family_of, read_config
from vlmcore.models.folder import save_folder
from vlmcore.recipe.train_stage import TrainStage
from vlmcore.training.checkpoint import Checkpointer
from vlmcore.training.distributed import process_group
from vlmcore.training.tuning import plan_lora, save_and_merge
from vlmcore.weights.adapters import FreshAdapter, write_peft

RANKS = 4
ROWS = 4
# Two choices keep Adam's first step from hiding faults: it ignores a gradient's scale (and turns
# the noise of a gradient that is zero by symmetry into a full step) unless epsilon is about as
# large as the gradients, and the norm must be far above clip_grad for clipping to show.
HYPER = {
    "adam_eps": 1e-2, "clip_grad": 0.5, "weight_decay": 0.1, "learning_rate": 0.1,
    "nproc_per_node": RANKS, "global_batch_size": ROWS,
}  # fmt: skip


def samples_of(encoder: ConversationEncoder) -> list[list[TokenSample]]:
    """The samples of four rows: uneven ones, so that a mean of means would show."""
    text = token_sample(encoder, "What is 12 + 30?", "42", "And half of it?", "21", images=[])
    weights = torch.arange(1, len(text.loss_scale) + 1) / len(text.loss_scale)
    text.loss_scale = text.loss_scale * weights  # as messages weigh their turns
    short = token_sample(encoder, "Hi", "Hello, what can I do for you?", images=[])
    long = token_sample(encoder, "Count.", "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15", images=[])
    if encoder.family.vision is None:
        return [[text, short], [short], [long, short, text], [text]]
    one = token_sample(encoder, "Read.", "7", images=[(96, 64)])
    two = token_sample(encoder, "Compare them.", "Not alike.", images=[(64, 64), (128, 32)])
    # the second row has no image, for data parallel ranks that see none
    return [[text, two, one], [short, long], [one], [short, two]]


def reference(
    hf_dir: Path, rows: list[list[TokenSample]], stage: TrainStage, out: Path
) -> dict[str, Any]:
    """Loss, gradient norm and updated weights of plain transformers and torch's AdamW, with peft's
    adapters where the stage has some."""
    family = family_of(read_config(hf_dir))
    model = hf_model(hf_dir)
    if stage.tuner_type != "full":
        write_peft(FreshAdapter(plan_lora(stage, hf_dir), seed=stage.seed), out / "fresh")
        model = with_adapter(hf_dir, out / "fresh", use_dora=stage.tuner_type == "dora")
    frozen = {"vit": stage.freeze_vit, "aligner": stage.freeze_aligner, "llm": stage.freeze_llm}
    rates = {"vit": stage.vit_lr, "aligner": stage.aligner_lr, "llm": None}
    groups = []
    for name, weight in model.named_parameters():
        group = family.group_of(name.removeprefix("base_model.model."))
        is_full = stage.tuner_type == "full" or (stage.tuner_type == "lora_llm" and group != "llm")
        weight.requires_grad_("lora_" in name or (is_full and not frozen[group]))
        if weight.requires_grad:
            decay = stage.weight_decay if weight.ndim > 1 else 0.0
            rate = rates[group] or stage.learning_rate
            groups.append({"params": [weight], "weight_decay": decay, "lr": rate})
    betas = (stage.adam_beta1, stage.adam_beta2)
    optimizer = torch.optim.AdamW(groups, betas=betas, eps=stage.adam_eps)
    for _ in range(stage.train_iters):
        optimizer.zero_grad()
        loss, of_routers = _losses(model, rows, stage)
        (loss + of_routers).backward()
        trained = [group["params"][0] for group in groups]
        norm = torch.nn.utils.clip_grad_norm_(trained, stage.clip_grad)
        optimizer.step()
    if stage.tuner_type != "full":
        model.save_pretrained(out / "adapter")
        model = model.merge_and_unload()
    model.save_pretrained(out)  # experts are stored otherwise than they stand in memory
    return {"loss": float(loss), "grad_norm": float(norm), "weights": saved(out)}


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a model folder, and its adapter's."""
    adapter = folder / "adapter" / "adapter_model.safetensors"
    weights = load_file(folder / "model.safetensors") | (
        load_file(adapter) if adapter.exists() else {}
    )
    # what the hub calls LLaVA's tower, and what transformers 5 saves it as
    return {key.replace("tower.vision_model.", "tower."): w for key, w in weights.items()}


def _losses(model: Any, rows: list[list[TokenSample]], stage: TrainStage) -> tuple[Any, Any]:
    """Mean over all trained tokens, and what the routers add."""
    total = sum(int((sample.loss_scale > 0).sum()) for row in rows for sample in row)
    gates = [m for name, m in model.named_modules() if name.endswith("mlp.gate")]
    loss, seen = 0.0, []
    for row in rows:
        with _router_logits(gates) as logits:
            loss = loss + sum(_loss_sum(model, sample) for sample in row) / total
        seen.append((sum(len(sample.input_ids) for sample in row), logits))
    return loss, _router_loss(seen, stage, top_k=gates[0].top_k if gates else 0)


def _loss_sum(model: Any, sample: TokenSample) -> torch.Tensor:
    ids = sample.input_ids[None]
    extra: dict[str, Any] = transformers_inputs(sample.vision)
    if extra:
        extra["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    logits = model(input_ids=ids, **extra).logits[0]
    losses = F.cross_entropy(logits, sample.labels, ignore_index=IGNORED, reduction="none")
    return (losses * sample.loss_scale).sum()


@contextmanager
def _router_logits(gates: list[Any]) -> Iterator[dict[int, list[torch.Tensor]]]:
    """By layer, the logits of every token that its router sees inside."""
    found: dict[int, list[torch.Tensor]] = defaultdict(list)

    def keep(index: int) -> Any:
        def hook(gate: Any, args: Any) -> None:
            found[index].append(F.linear(args[0].reshape(-1, gate.weight.shape[1]), gate.weight))

        return hook

    handles = [gate.register_forward_pre_hook(keep(i)) for i, gate in enumerate(gates)]
    yield found
    for handle in handles:
        handle.remove()


def _router_loss(rows: list[tuple[int, dict]], stage: TrainStage, *, top_k: int) -> Any:
    """Switch Transformers' balancing loss (arXiv 2101.03961) and ST-MoE's z-loss (2202.08906), of
    each row and layer; rows count as their tokens."""
    losses: Any = 0.0
    for num_tokens, by_layer in rows:
        for parts in by_layer.values():
            logits = torch.cat(parts)
            probs, experts = logits.softmax(-1), logits.shape[1]
            chosen = F.one_hot(logits.topk(top_k).indices, experts).sum(1).float()
            balance = experts / top_k * (chosen.mean(0) * probs.mean(0)).sum()
            z = logits.logsumexp(-1).pow(2).mean()
            weighted = stage.moe_aux_loss_coeff * balance + stage.moe_z_loss_coeff * z
            losses = losses + weighted * num_tokens
    return losses / sum(num_tokens for num_tokens, _ in rows)


class NoLoader:
    def save_state_rank(self) -> None: ...

    def restore_state_rank(self, _: None) -> None: ...


def checkpoint_of_one_step(
    hf_dir: Path, rows: list[list[TokenSample]], stage: TrainStage, folder: Path
) -> None:
    """What a stage that is killed after its first step leaves behind."""
    with prepared(stage, hf_dir, idle_inputs=idle_inputs(hf_dir)) as training:
        training.step(batch_of(rows, stage))
        Checkpointer(folder, training=training, stage=stage, loader=NoLoader()).save(1)


def idle_inputs(hf_dir: Path) -> dict[str, torch.Tensor]:
    return dummy_vision_inputs(ConversationEncoder(hf_dir, task="sft"))


def batch_of(rows: list[list[TokenSample]], stage: TrainStage) -> list[PackedRow]:
    """This data parallel rank's micro batches."""
    here, replicas = parallel_state.get_data_parallel_rank(), stage.data_parallel_size
    return [row_of(row, multiple=stage.row_multiple) for row in rows[here::replicas]]


def megatron_step(
    hf_dir: Path, rows: list[list[TokenSample]], stage: TrainStage, out: Path, work: Path
) -> dict[str, Any]:
    """The same figures from the megatron engine, its weights by way of HF safetensors."""
    with prepared(stage, hf_dir, idle_inputs=idle_inputs(hf_dir)) as training:
        batch = batch_of(rows, stage)
        checkpoints = Checkpointer(work, training=training, stage=stage, loader=NoLoader())
        for _ in range(checkpoints.restore(), stage.train_iters):
            total, tokens = training.evaluate(batch)
            outcome = training.step(batch)
        training.gather_weights()
        if training.plan is not None:
            save_and_merge(
                training.modules, training.plan, out / "adapter", hf_dir=hf_dir, work=out / "work"
            )
        save_folder(training.modules, out, like=hf_dir)
    outcome["evaluated"] = total / tokens
    return outcome | {"weights": saved(out) if dist.get_rank() == 0 else {}}


def compare(before: dict, expected: dict, found: dict) -> dict[str, Any]:
    """Figures of one case; weight errors are relative to the largest weight of the tensor."""
    errors, moved = {}, []
    for key, weight in found["weights"].items():
        wanted = expected["weights"][key]
        errors[key] = float((weight - wanted).abs().max() / wanted.abs().max())
        if key not in before or not torch.equal(weight, before[key]):
            moved.append(key)
    assert found["weights"].keys() == expected["weights"].keys()
    worst = max(errors, key=errors.__getitem__)
    return {
        "loss": abs(found["loss"] - expected["loss"]),
        "grad_norm": abs(found["grad_norm"] / expected["grad_norm"] - 1),
        "evaluated": abs(found["evaluated"] - found["loss"]),
        "clipped": expected["grad_norm"] > HYPER["clip_grad"],
        "keys": len(errors),
        "worst": [worst, errors[worst]],
        "moved": moved,
        "logged": {name: found[name] for name in ("aux_loss", "z_loss") if name in found},
    }


def main(cases: list[dict[str, Any]], out: Path) -> None:
    results = {}
    for case in cases:
        hf_dir = Path(case["hf"])
        rows = samples_of(ConversationEncoder(hf_dir, task="sft"))
        before = saved(hf_dir)
        leads, expected = dist.get_rank() == 0, {}
        if leads:
            folder = out.parent / f"reference {case['name']}"
            expected = reference(hf_dir, rows, stage(**(HYPER | case["fields"])), folder)
        scratch = out.parent / f"scratch {case['name']}"
        scratch.mkdir(exist_ok=True)
        dist.barrier()
        if case["killed_at"] is not None:
            before_kill = stage(**(HYPER | case["fields"] | case["killed_at"]))
            checkpoint_of_one_step(hf_dir, rows, before_kill, scratch)
        for layout, fields in case["layouts"].items():
            name = f"{case['name']} {layout}"
            folder = out.parent / name.replace(" ", "_")
            found = megatron_step(
                hf_dir, rows, stage(**(HYPER | case["fields"] | fields)), folder, scratch
            )
            if leads:
                results[name] = compare(before, expected, found)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(results))


if __name__ == "__main__":
    with process_group(num_threads=1):
        main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
