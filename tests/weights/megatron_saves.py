"""On two ranks, tensor parallel 2: save a model as it was loaded, then train its aligner one step
and checkpoint it; arguments: Megatron model folder, the two targets."""

import sys
from pathlib import Path

import torch.distributed as dist

from tests.tiny.megatron import stage, under_training
from tests.tiny.rows import row_of, token_sample
from vlmcore.dataloading.encode import ConversationEncoder
from vlmcore.layout import Layout
from vlmcore.models.build import save_weights
from vlmcore.training.checkpoint import Checkpointer
from vlmcore.training.distributed import model_parallel, process_group
from vlmcore.training.optimizer import build_schedule
from vlmcore.training.step import train_step
from vlmcore.weights.convert import CHECKPOINT, SIDECAR

ALIGNER = stage(freeze_vit=True, freeze_llm=True, tensor_model_parallel_size=2)


class NoLoader:
    def save_state_rank(self) -> None: ...


def main(source: Path, saved: Path, trained: Path) -> None:
    model, optimizer = under_training(source, ALIGNER)
    save_weights([model.module], saved)
    encoder = ConversationEncoder(source / SIDECAR, task="sft")
    train_step(
        model, optimizer, [row_of([token_sample(encoder, "Read.", "12", images=[(96, 64)])])]
    )
    schedule = build_schedule(optimizer, ALIGNER)
    checkpoints = Checkpointer(
        trained, model=model, optimizer=optimizer, schedule=schedule, loader=NoLoader()
    )
    checkpoints.save(1)
    if dist.get_rank() == 0:
        (trained / "iter_0000001").rename(trained / CHECKPOINT)


if __name__ == "__main__":
    with process_group(num_threads=1), model_parallel(Layout(tensor_model_parallel_size=2), seed=0):
        main(*map(Path, sys.argv[1:]))
