"""On one rank without a GPU: AdamW of Megatron's hybrid optimizer beside our own, with parameters
taken for a GPU's where it deals them out; arguments: HF folder, JSON file of the losses by case.

Everything but the copy between two memories is as on a GPU: which parameters are offloaded, both
updates, checkpoints and a restart from one.
"""

import json
import sys
from pathlib import Path
from typing import Any

from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.tiny.megatron import stage
from tests.training.dtype_ranks import outcomes
from vlmcore.training import model
from vlmcore.training.distributed import process_group

FIELDS = {
    "train_iters": 8,
    "nproc_per_node": 1,
    "global_batch_size": 4,
    "learning_rate": 3e-3,
    "torch_dtype": "bfloat16",
}
CASES: dict[str, dict[str, Any]] = {
    "none": {},
    "half": {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5},
    "all": {"optimizer_cpu_offload": True},
}


class OnGpu(TorchFunctionMode):
    """Tensors say that they lie on a GPU, but for copies on the host and what is made of them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.is_cuda.__get__:
            return not hasattr(args[0], "on_host")
        made = args[0].detach().clone() if func is Tensor.cpu else func(*args, **(kwargs or {}))
        if func is Tensor.cpu or (isinstance(made, Tensor) and hasattr(args[0], "on_host")):
            made.on_host = True
        return made


def main(hf_dir: Path, out: Path) -> None:
    deal_out = HybridDeviceOptimizer._get_sub_optimizer_param_groups
    dealt: list[tuple[int, int]] = []

    def on_gpu(self: HybridDeviceOptimizer, fraction: float) -> Any:
        self.pin_cpu_grads = False  # no memory can be pinned without a GPU
        with OnGpu():
            groups = deal_out(self, fraction)
        dealt.append(
            tuple(sum(w.numel() for g in side for w in g["params"]) for side in groups[:2])
        )
        return groups

    HybridDeviceOptimizer._get_sub_optimizer_param_groups = on_gpu
    model._require_gpu = lambda *_, **__: None  # it would refuse
    results = {}
    for name, fields in CASES.items():
        work = out.parent / name
        work.mkdir()
        dealt.clear()
        losses = [row["loss"] for row in outcomes(hf_dir, stage(**FIELDS, **fields), work)]
        results[name] = {"losses": losses, "on_host_and_gpu": dealt[-1] if dealt else None}
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    with process_group(num_threads=1):
        main(Path(sys.argv[1]), Path(sys.argv[2]))
