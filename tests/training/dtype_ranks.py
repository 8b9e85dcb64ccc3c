"""On two ranks: a few steps in each dtype; arguments: HF folder, JSON of stage fields by case, JSON
file of the outcomes by case."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.tiny.megatron import prepared, stage
from tests.training.step_cases import NoLoader, batch_of, idle_inputs, samples_of
from vlmcore.dataloading.encode import ConversationEncoder
from vlmcore.errors import TrainError
from vlmcore.recipe.train_stage import TrainStage
from vlmcore.training.checkpoint import Checkpointer
from vlmcore.training.distributed import process_group
from vlmcore.training.model import Training

STEPS = 8


def outcomes(hf_dir: Path, wanted: TrainStage, work: Path) -> list[dict[str, Any]]:
    """Of every step; half of them after a restart from a checkpoint."""
    rows = samples_of(ConversationEncoder(hf_dir, task="sft"))
    found: list[dict[str, Any]] = []
    for _ in range(2):
        with prepared(wanted, hf_dir, idle_inputs=idle_inputs(hf_dir)) as training:
            checkpoints = Checkpointer(work, training=training, stage=wanted, loader=NoLoader())
            first = checkpoints.restore()
            for step in range(first, first + STEPS // 2):
                rate, before = training.learning_rate, weights(training)
                outcome = training.step(batch_of(rows, wanted))
                training.gather_weights()
                moved = not torch.equal(before, weights(training))
                found.append(outcome | {"step": step, "rate": rate, "moved": moved})
            checkpoints.save(first + STEPS // 2)
    return found


def weights(training: Training) -> torch.Tensor:
    return torch.cat([w.detach().flatten() for m in training.modules for w in m.parameters()])


def main(hf_dir: Path, cases: dict[str, dict[str, Any]], out: Path) -> None:
    results: dict[str, Any] = {}
    for name, fields in cases.items():
        work = out.parent / name
        work.mkdir(exist_ok=True)
        try:
            wanted = stage(train_iters=STEPS, global_batch_size=4, clip_grad=1.0, **fields)
            results[name] = outcomes(Path(fields.get("hf", hf_dir)), wanted, work)
        except TrainError as error:
            results[name] = str(error)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(results))


if __name__ == "__main__":
    with process_group(num_threads=1):
        main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]))
