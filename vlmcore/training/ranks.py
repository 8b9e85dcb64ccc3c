"""The ranks of the transformers engine: each reads its own data, and holds all or a share."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist

from vlmcore.kernels.matrix_products import fast_products


@contextmanager
def data_parallel_ranks(*, num_threads: int, seed: int) -> Iterator[None]:
    """Joins torchrun's process group, nccl with a GPU and gloo without; seeds every generator."""
    torch.set_num_threads(num_threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        with fast_products():
            yield
    finally:
        dist.destroy_process_group()
