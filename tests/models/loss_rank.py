"""On one rank: token losses by whole logits or in chunks; prints peak memory in MB past the inputs;
arguments: tokens of a chunk."""

import sys
from pathlib import Path

import torch

from vlmcore.layout import Layout
from vlmcore.models.loss import token_losses
from vlmcore.training.distributed import model_parallel, process_group

TOKENS, VOCABULARY, HIDDEN = 4096, 8192, 16


def peak_kb() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def main(chunk_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, 1, HIDDEN, generator=generator).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (1, TOKENS), generator=generator)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is the parent process's too
    before = peak_kb()
    losses = token_losses(
        hidden, weight, labels, vocab_size=VOCABULARY, sequence_parallel=False,
        chunk_tokens=chunk_tokens,
    )  # fmt: skip
    losses.sum().backward()
    peak = (peak_kb() - before) / 1024
    sys.stdout.write(f"peak {peak}\n")


if __name__ == "__main__":
    with process_group(num_threads=1), model_parallel(Layout(), seed=0):
        main(int(sys.argv[1]))
