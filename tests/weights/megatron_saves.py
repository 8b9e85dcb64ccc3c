"""On two ranks, tensor parallel 2: save a model as it was loaded, then train its aligner one step
and have Megatron save it whole, optimizer included; arguments: Megatron model folder, the two
targets."""

import sys
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing

from tests.tiny.megatron import stage
from tests.tiny.rows import row_of, token_sample
from vlmcore.dataloading.encode import ConversationEncoder
from vlmcore.models.build import save_weights, sharded_state_dict
from vlmcore.training.distributed import model_parallel, process_group
from vlmcore.training.model import prepare
from vlmcore.training.torch_dist_state import training_state
from vlmcore.weights.convert import CHECKPOINT, SIDECAR

ALIGNER = stage(freeze_vit=True, freeze_llm=True, tensor_model_parallel_size=2)


def main(source: Path, saved: Path, trained: Path) -> None:
    training = prepare(ALIGNER, source)
    save_weights(training.modules, saved)
    encoder = ConversationEncoder(source / SIDECAR, task="sft")
    training.step([row_of([token_sample(encoder, "Read.", "12", images=[(96, 64)])])])
    model = {f"model{i}": sharded_state_dict(m) for i, m in enumerate(training.modules)}
    if dist.get_rank() == 0:
        (trained / CHECKPOINT).mkdir(parents=True)
    dist.barrier()
    state = training_state(training, loading=False)  # its frozen weights are left out
    dist_checkpointing.save(state | model, str(trained / CHECKPOINT))


if __name__ == "__main__":
    with process_group(num_threads=1), model_parallel(ALIGNER.layout, seed=0):
        main(*map(Path, sys.argv[1:]))
