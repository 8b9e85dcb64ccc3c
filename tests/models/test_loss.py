"""Cross entropy in chunks of tokens, on one rank; other layouts are held by the step's test."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from vlmcore import proc
from vlmcore.models.loss import token_losses

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    from vlmcore.layout import Layout
    from vlmcore.training.distributed import model_parallel, process_group

    os.environ |= ALONE | {"MASTER_PORT": str(proc.free_port())}
    with process_group(num_threads=1), model_parallel(Layout(), seed=0):
        yield


@pytest.mark.slow  # it teaches the process to do without CUDA
@pytest.mark.parametrize("chunk_tokens", [3, 7, 100])
def test_losses_and_gradients_are_those_of_whole_logits(one_rank: None, chunk_tokens: int) -> None:
    """Some labels are left out, and the last two rows of the weight only pad the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 1, 8, generator=generator).requires_grad_()
    weight = torch.randn(13, 8, generator=generator).requires_grad_()
    labels = torch.randint(0, 11, (1, 20), generator=generator)
    labels[:, ::3] = -100
    losses = token_losses(
        hidden, weight, labels, vocab_size=11, sequence_parallel=False, chunk_tokens=chunk_tokens
    )
    logits = F.linear(hidden[:, 0], weight[:11])
    expected = F.cross_entropy(logits, labels[0], ignore_index=-100, reduction="none")
    torch.testing.assert_close(losses[0], expected)
    probe = torch.arange(20.0)
    found = torch.autograd.grad((losses[0] * probe).sum(), (hidden, weight))
    wanted = torch.autograd.grad((expected * probe).sum(), (hidden, weight))
    torch.testing.assert_close(found, wanted)


@pytest.mark.slow
def test_a_row_without_a_label_still_has_a_gradient_of_zero(one_rank: None) -> None:
    hidden = torch.randn(4, 1, 8).requires_grad_()
    labels = torch.full((1, 4), -100)
    losses = token_losses(
        hidden, torch.randn(13, 8), labels, vocab_size=13, sequence_parallel=False
    )
    losses.sum().backward()
    assert not losses.any()
    assert not hidden.grad.any()


@pytest.mark.slow
def test_logits_are_never_whole_in_memory() -> None:
    """4,096 tokens by 8,192 of vocabulary are 128 MB in fp32, and cross entropy holds several."""
    peaks = {}
    for chunk_tokens in (4096, 256):
        env = os.environ | ALONE | {"MASTER_PORT": str(proc.free_port())}
        command = [sys.executable, "-m", "tests.models.loss_rank", str(chunk_tokens)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        peaks[chunk_tokens] = float(done.stdout.rpartition("peak ")[2])
    assert peaks[4096] > 128
    assert peaks[256] < 128
