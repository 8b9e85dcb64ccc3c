"""On two ranks, tensor parallel 2: save a model as it was loaded, then train its aligner one step
and checkpoint it; arguments: Megatron model folder, the two targets."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from PIL import Image

from vlmcore.dataloading.encode import ConversationEncoder
from vlmcore.dataloading.samples import PackedRow, TokenSample, pack_row
from vlmcore.families import family_of, read_config
from vlmcore.models.build import build_model, load_weights
from vlmcore.recipe.schema import TrainStage
from vlmcore.training.checkpoint import Checkpointer, save_weights
from vlmcore.training.distributed import model_parallel, process_group
from vlmcore.training.freezing import apply_freezes
from vlmcore.training.optimizer import build_optimizer, build_schedule
from vlmcore.training.step import train_step
from vlmcore.weights.convert import CHECKPOINT, SIDECAR

STAGE = TrainStage(
    name="aligner",
    data=("numbers",),
    train_iters=1,
    learning_rate=0.1,
    lr_warmup_fraction=0.0,
    freeze_vit=True,
    freeze_llm=True,
    nproc_per_node=2,
    tensor_model_parallel_size=2,
    torch_dtype="float32",
)


class NoLoader:
    def save_state_rank(self) -> None: ...


def one_row(hf_dir: Path) -> PackedRow:
    encoder = ConversationEncoder(hf_dir, task="sft")
    pixels, grids = encoder.patches([Image.effect_noise((96, 64), 50).convert("RGB")])
    turns = [
        {"role": "user", "content": "<image>Read."},
        {"role": "assistant", "content": "12"},
    ]
    text = encoder.encode(turns, grids.tolist())
    sample = TokenSample(
        __key__="0",
        __restore_key__=(),
        input_ids=text.input_ids,
        labels=text.labels,
        position_ids=text.position_ids,
        images=[],
        pixel_values=pixels,
        image_grid_thw=grids,
    )
    return pack_row([sample], pad_token_id=0, multiple=1)


def main(source: Path, saved: Path, trained: Path) -> None:
    hf_dir = source / SIDECAR
    module = build_model(hf_dir, tensor_model_parallel_size=2)
    load_weights(module, source / CHECKPOINT)
    save_weights(module, saved)

    apply_freezes(module, family_of(read_config(hf_dir)), STAGE)
    config = DistributedDataParallelConfig(
        use_distributed_optimizer=True, grad_reduce_in_fp32=True
    )
    model = DistributedDataParallel(module.config, config, module)
    optimizer = build_optimizer(model, STAGE)
    module.config.grad_scale_func = optimizer.scale_loss
    module.config.finalize_model_grads_func = finalize_model_grads
    schedule = build_schedule(optimizer, STAGE)
    train_step(model, optimizer, [one_row(hf_dir)])
    Checkpointer(
        trained, model=model, optimizer=optimizer, schedule=schedule, loader=NoLoader()
    ).save(1)
    if dist.get_rank() == 0:
        (trained / "iter_0000001").rename(trained / CHECKPOINT)


if __name__ == "__main__":
    torch.manual_seed(0)
    with process_group(num_threads=1), model_parallel(tensor_model_parallel_size=2, seed=0):
        main(*map(Path, sys.argv[1:]))
