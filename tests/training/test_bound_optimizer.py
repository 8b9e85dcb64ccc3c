"""What the optimizer binds once, and that it updates as Megatron's own does, on one rank.

The test of a step holds layouts.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmcore import proc
from vlmcore.training import bound_optimizer
from vlmcore.training.bound_optimizer import joined

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 2000}
CLIPPED = {"clip_grad": 0.5}
# a last bit of the norm would round some half weights otherwise
FREE = {"clip_grad": 1e3}
CASES: dict[str, dict[str, Any]] = {
    "fp32": CLIPPED,
    "fp32_overlap": CLIPPED | OVERLAP,
    "bf16": FREE | {"torch_dtype": "bfloat16"},
    "fp16": FREE | {"torch_dtype": "float16", "initial_loss_scale": 64.0},
}
STEPS = 3


def test_what_lies_side_by_side_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bound_optimizer, "LONGEST", 10)
    buffer, other = torch.arange(40.0), torch.arange(100.0, 104.0)
    parts = [buffer[6:8], buffer[20:36].view(4, 4), other, buffer[0:6].view(2, 3), buffer[9:12]]
    found = joined(parts)
    assert sorted(len(run) for run in found) == [3, 4, 6, 8, 10]  # 8 = 6 + 2, 16 = 10 + 6
    for run in found:
        run.mul_(-1)
    assert sorted(torch.cat(found)) == sorted(torch.cat([part.flatten() for part in parts]))
    assert buffer[8] == 8 and buffer[12] == 12  # what lay between
    assert torch.equal(other, -torch.arange(100.0, 104.0))


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    from vlmcore.training.distributed import process_group

    os.environ |= ALONE | {"MASTER_PORT": str(proc.free_port())}
    # Megatron is imported already, so what it compiles is still to be compiled
    with torch.compiler.set_stance("force_eager"), process_group(num_threads=1):
        yield


def state_of(training: Any) -> dict[str, torch.Tensor]:
    """Weights, and what the optimizer keeps of each."""
    found = {
        f"{i}.{name}": weight.detach().clone()
        for i, module in enumerate(training.modules)
        for name, weight in module.named_parameters()
    }
    for i, part in enumerate(training.optimizer.chained_optimizers):
        for j, shard in enumerate(part.get_parameters()):
            kept = {"main": shard} | part.optimizer.state[shard]
            found |= {f"{i}.{j}.{name}": tensor.detach().clone() for name, tensor in kept.items()}
    return found


def three_steps(fields: dict[str, Any], hf_dir: Path, work: Path, check: Any = None) -> Any:
    """What every step told, with a checkpoint taken up before the last, and the state it left."""
    from tests.tiny.megatron import prepared, stage
    from tests.training.step_cases import batch_of, idle_inputs, samples_of
    from vlmcore.dataloading.encode import ConversationEncoder

    wanted = stage(
        nproc_per_node=1, train_iters=STEPS, global_batch_size=4, learning_rate=1e-2,
        weight_decay=0.1, **fields,
    )  # fmt: skip
    rows = samples_of(ConversationEncoder(hf_dir, task="sft"))
    told = []
    work.mkdir()
    with prepared(wanted, hf_dir, idle_inputs=idle_inputs(hf_dir)) as training:
        for step in range(STEPS):
            if step == STEPS - 1:
                training.save_state(work)
                training.load_state(work)
            told.append(training.step(batch_of(rows, wanted)))
            if check is not None:
                check(training)
        training.gather_weights()
        return told, state_of(training)


@pytest.mark.slow  # it teaches the process to do without CUDA
@pytest.mark.parametrize("case", CASES)
def test_it_updates_as_megatrons_own(
    one_rank: None, tiny_model: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, case: str,
) -> None:  # fmt: skip
    """Bit for bit, but for the norm: its sum is rounded elsewhere."""
    from megatron.core.optimizer import ChainedOptimizer

    from vlmcore import megatron_cpu
    from vlmcore.training import model, optimizer

    hf_dir = tiny_model("qwen3_vl")
    found, state = three_steps(CASES[case], hf_dir, tmp_path / "bound")
    monkeypatch.setattr(optimizer, "BoundOptimizer", ChainedOptimizer)
    monkeypatch.setattr(model, "_accumulate_in_buffers", lambda chunk: None)
    monkeypatch.setattr(megatron_cpu, "suspended", nullcontext)  # its own step asks for CUDA
    expected, wanted = three_steps(CASES[case], hf_dir, tmp_path / "megatron")
    close = {"rtol": 1e-4, "atol": 1e-6} if CASES[case]["clip_grad"] < 1 else {"rtol": 0, "atol": 0}
    for ours, theirs in zip(found, expected, strict=True):
        assert 0.5 < ours["grad_norm"] < 1e3
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=close["rtol"])
    assert state.keys() == wanted.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, wanted[name], **close)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_gradients_and_weights_stay_in_their_buffers(
    one_rank: None, tiny_model: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    """Over steps, a checkpoint written and one taken up."""

    def check(training: Any) -> None:
        training.gather_weights()
        in_place = case == "fp32"  # else a hook has to add them
        for weight in training.chunks[0].params_with_grad:
            assert weight.main_grad.any()
            if in_place:
                assert weight.grad.data_ptr() == weight.main_grad.data_ptr()
            else:
                assert weight.grad is None
        for part in training.optimizer.chained_optimizers:
            for weight, shard in bound_optimizer._shards(part):
                # of one rank alone, so the shard is the whole
                assert shard.grad.data_ptr() == weight.main_grad.data_ptr()
                buffer, _, bucket = part.model_param_gbuf_map[weight]
                values = part.buffers[buffer].buckets[bucket].param_data
                begin, size = values.data_ptr(), values.numel() * values.itemsize
                assert begin <= weight.data_ptr() < begin + size
                assert torch.equal(weight.detach().flatten(), shard.to(weight.dtype))

    three_steps(CASES[case], tiny_model("qwen3_vl"), tmp_path / "state", check)
