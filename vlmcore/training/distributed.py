"""Process groups, model parallel layout and seeds of a training or checking process."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from vlmcore import megatron_cpu


@contextmanager
def process_group(*, num_threads: int) -> Iterator[None]:
    """Joins torchrun's process group: nccl with a GPU, gloo without."""
    torch.set_num_threads(num_threads)
    megatron_cpu.install()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def model_parallel(*, tensor_model_parallel_size: int, seed: int) -> Iterator[None]:
    """Lays the ranks out for Megatron-Core and seeds every generator."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_model_parallel_size, create_gloo_process_groups=True
    )
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
