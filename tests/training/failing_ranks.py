"""On two ranks: one fails with an error of its own while the other waits for it."""

import torch.distributed as dist

from vlmcore.training.distributed import process_group

if __name__ == "__main__":
    with process_group(num_threads=1):
        if dist.get_rank() == 1:
            raise KeyError("the weight that nobody has")
        dist.barrier()
