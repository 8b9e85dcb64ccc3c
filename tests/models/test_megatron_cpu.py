"""Every case in a fresh interpreter: `install()` patches the process that it is called in."""

import subprocess
import sys

import pytest
import torch

UNTOUCHED = """
import torch
torch.cuda.is_available = lambda: True
before = {name: getattr(torch.cuda, name) for name in dir(torch.cuda)}
from vlmcore import megatron_cpu
megatron_cpu.install()
assert before == {name: getattr(torch.cuda, name) for name in dir(torch.cuda)}
assert torch.ones(1).type() == "torch.FloatTensor"
"""

TAUGHT = """
import torch
from vlmcore import megatron_cpu
megatron_cpu.install()
megatron_cpu.install()
for device in ("cuda", "cuda:0", 0, torch.device("cuda", 0)):
    assert torch.ones(2, device=device).device.type == "cpu"
    assert torch.ones(2).to(device).device.type == "cpu"
    assert torch.ones(2).to(device=device).device.type == "cpu"
weight = torch.ones(2, pin_memory=True)
assert weight.cuda() is weight
assert weight.type() == "torch.cuda.FloatTensor"
assert megatron_cpu.device() == torch.device("cpu")
state = torch.cuda.get_rng_state()
first = torch.rand(3)
torch.cuda.set_rng_state(state)
assert torch.equal(torch.rand(3), first)
with torch.cuda.stream(torch.cuda.Stream()):
    event = torch.cuda.Event()
    event.record()
    assert event.query()
torch.cuda.synchronize()
"""

UNLOADED = """
import sys
import vlmcore.megatron_cpu
assert not [name for name in sys.modules if name.startswith("megatron")]
"""


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(UNTOUCHED, id="nothing is touched where CUDA is there"),
        pytest.param(UNLOADED, id="importing it loads no megatron"),
        pytest.param(
            TAUGHT,
            id="calls for CUDA land on the CPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there"),
        ),
    ],
)
def test_install(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
