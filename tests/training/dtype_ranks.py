"""On two ranks: a few steps in each dtype; arguments: JSON of cases by name, JSON file of the
outcomes by case.

A case has the HF folder, the fields of its stage and, where one is to overflow, the step at which
an expert's gradient does.
"""

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.tiny.megatron import prepared, stage
from tests.training.step_cases import NoLoader, batch_of, idle_inputs, samples_of
from vlmcore import megatron_cpu
from vlmcore.dataloading.encode import ConversationEncoder
from vlmcore.errors import TrainError
from vlmcore.recipe.train_stage import TrainStage
from vlmcore.training.checkpoint import Checkpointer
from vlmcore.training.distributed import process_group
from vlmcore.training.model import Training

STEPS = 8


def outcomes(
    hf_dir: Path, wanted: TrainStage, work: Path, *, overflow_at: int | None = None
) -> list[dict[str, Any]]:
    """Of every step; half of them after a restart from a checkpoint."""
    rows = samples_of(ConversationEncoder(hf_dir, task="sft"))
    found: list[dict[str, Any]] = []
    for _ in range(2):
        with prepared(wanted, hf_dir, idle_inputs=idle_inputs(hf_dir)) as training:
            checkpoints = Checkpointer(work, training=training, stage=wanted, loader=NoLoader())
            first = checkpoints.restore()
            for step in range(first, first + STEPS // 2):
                rate, before = training.learning_rate, weights(training)
                overflow = overflowing_expert if step == overflow_at else nullcontext
                with overflow(training):
                    outcome = training.step(batch_of(rows, wanted))
                training.gather_weights()
                moved = is_true_anywhere(not torch.equal(before, weights(training)))
                found.append(outcome | {"step": step, "rate": rate, "moved": moved})
            checkpoints.save(first + STEPS // 2)
    return found


def weights(training: Training) -> torch.Tensor:
    """The model's, and this rank's fp32 ones of the optimizer."""
    found = [weight for module in training.modules for weight in module.parameters()]
    found += [weight for group in training.optimizer.param_groups for weight in group["params"]]
    return torch.cat([weight.detach().flatten() for weight in found])


@contextmanager
def overflowing_expert(training: Training) -> Iterator[None]:
    """One weight of one expert gets an infinite gradient, on the last rank alone."""
    named = [pair for module in training.modules for pair in module.named_parameters()]
    expert = [weight for name, weight in named if ".experts." in name][-1]
    handle = expert.register_hook(
        lambda grad: torch.full_like(grad, math.inf) if is_last_rank() else grad
    )
    yield
    handle.remove()


def is_last_rank() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def is_true_anywhere(flag: bool) -> bool:
    flags = torch.tensor([flag], dtype=torch.int, device=megatron_cpu.device())
    dist.all_reduce(flags)
    return bool(flags)


def main(cases: dict[str, dict[str, Any]], out: Path) -> None:
    results: dict[str, Any] = {}
    for name, case in cases.items():
        work = out.parent / name
        work.mkdir(exist_ok=True)
        try:
            wanted = stage(train_iters=STEPS, global_batch_size=4, clip_grad=1.0, **case["fields"])
            results[name] = outcomes(
                Path(case["hf"]), wanted, work, overflow_at=case["overflow_at"]
            )
        except TrainError as error:
            results[name] = str(error)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(results))


if __name__ == "__main__":
    with process_group(num_threads=1):
        main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
