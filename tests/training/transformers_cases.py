"""On two ranks: optimizer steps of the transformers engine beside plain transformers and AdamW, for
each model and way to share it out; arguments: JSON of cases, JSON file of the results.

See step_cases for the reference. A case that is `killed_at` a layout goes on from the checkpoint
that one step at that layout has left.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.tiny.megatron import stage
from tests.tiny.rows import row_of
from tests.training.step_cases import (
    HYPER,
    NoLoader,
    compare,
    idle_inputs,
    reference,
    samples_of,
    saved,
)
from vlmcore.dataloading.encode import ConversationEncoder
from vlmcore.dataloading.samples import TokenSample
from vlmcore.recipe.train_stage import TrainStage
from vlmcore.training.checkpoint import Checkpointer
from vlmcore.training.job import TrainJob
from vlmcore.training.ranks import data_parallel_ranks
from vlmcore.training.transformers_engine import prepare


def steps(
    hf_dir: Path, rows: list[list[TokenSample]], stage: TrainStage, work: Path, *, until: int
) -> Any:
    """The training after `until` steps, from the checkpoint in `work` if there is one."""
    training = prepare(stage, hf_dir, idle_inputs=idle_inputs(hf_dir))
    batch = [row_of(row) for row in rows[dist.get_rank() :: dist.get_world_size()]]
    checkpoints = Checkpointer(work, training=training, stage=stage, loader=NoLoader())
    outcome: dict[str, Any] = {}
    for _ in range(checkpoints.restore(), until):
        total, tokens = training.evaluate(batch)
        outcome = training.step(batch) | {"evaluated": total / tokens}
    return training, outcome, checkpoints


def run(
    hf_dir: Path, rows: list[list[TokenSample]], stage: TrainStage, out: Path, work: Path
) -> dict[str, Any]:
    """Figures of the last step and the weights that were written."""
    training, outcome, _ = steps(hf_dir, rows, stage, work, until=stage.train_iters)
    job = TrainJob(stage=stage, model_dir=hf_dir, datasets={}, output_dir=out, scratch_dir=work)
    training.write(job)
    return outcome | {"weights": saved(out) if dist.get_rank() == 0 else {}}


def main(cases: list[dict[str, Any]], out: Path) -> None:
    results = {}
    leads = dist.get_rank() == 0
    always = HYPER | {"engine": "transformers", "nproc_per_node": dist.get_world_size()}
    for case in cases:
        hf_dir = Path(case["hf"])
        rows = samples_of(ConversationEncoder(hf_dir, task="sft"))
        expected: dict[str, Any] = {}
        if leads:
            folder = out.parent / f"reference {case['name']}"
            expected = reference(hf_dir, rows, stage(**(always | case["fields"])), folder)
        dist.barrier()
        for layout, fields in case["layouts"].items():
            name = f"{case['name']} {layout}"
            told = stage(**(always | case["fields"] | fields))
            work = out.parent / f"scratch {name}"
            work.mkdir(exist_ok=True)
            dist.barrier()
            if case["killed_at"] is not None:
                before = stage(**(always | case["fields"] | case["killed_at"]))
                _, _, checkpoints = steps(hf_dir, rows, before, work, until=1)
                checkpoints.save(1)
            found = run(hf_dir, rows, told, out.parent / name.replace(" ", "_"), work)
            if leads:
                results[name] = compare(saved(hf_dir), expected, found)
                out.write_text(json.dumps(results))


if __name__ == "__main__":
    with data_parallel_ranks(num_threads=1, seed=0):
        main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
