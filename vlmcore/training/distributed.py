"""Process groups, model parallel layout and seeds of a training or checking process."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from vlmcore import megatron_cpu
from vlmcore.errors import TrainError
from vlmcore.kernels.matrix_products import fast_products
from vlmcore.layout import Layout


@contextmanager
def process_group(*, num_threads: int) -> Iterator[None]:
    """Joins torchrun's process group: nccl with a GPU, gloo without."""
    torch.set_num_threads(num_threads)
    megatron_cpu.install()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        with fast_products():
            yield
    finally:
        dist.destroy_process_group()


@contextmanager
def model_parallel(layout: Layout, *, seed: int) -> Iterator[None]:
    """Lays the ranks out for Megatron-Core and seeds every generator.

    Models built inside should be out of reach at the end: they hold on to the groups.

    Raises:
        TrainError: The ranks do not hold whole replicas of this layout.
    """
    num_ranks = dist.get_world_size()
    if num_ranks % layout.num_ranks:
        raise TrainError(
            f"layout {layout}: one replica takes {layout.num_ranks} ranks, which does not divide "
            f"the {num_ranks} there are"
        )
    virtual = layout.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
        create_gloo_process_groups=True,
    )
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    gc.freeze()  # so that the collection below need not look at the libraries' million objects
    try:
        yield
    finally:
        _end_groups()
        parallel_state.destroy_model_parallel()
        gc.collect()
        gc.unfreeze()


def _end_groups() -> None:
    """Ends every group but that of all ranks; Megatron-Core 0.16 forgets most of its own.

    Under gloo a group keeps threads that wake a hundred times a second, for as long as anything,
    such as a model, refers to it: after a hundred layouts nothing else would run.
    """
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
