"""What a step cost: speed, floating-point work and memory."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vlmcore.families import LanguageModel
from vlmcore.recipe.train_stage import TrainStage

LARGEST_MEMORY = "largest_rank_memory_mb"  # in the log: the peak of the rank with the largest

# Dense bf16 TFLOP/s without sparsity, from NVIDIA's data sheets; the first name found decides.
PEAK_TFLOPS = {
    "B200": 2250.0, "H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "H800": 989.0, "H20": 148.0,
    "A100": 312.0, "A800": 312.0, "L40S": 362.0,
}  # fmt: skip


@dataclass(frozen=True)
class Throughput:
    """Figures of steps for the log.

    Only the language model's work is counted, so `mfu` is a lower bound; the vision tower's share
    depends on the family. Recompute does not count as work.
    """

    model: LanguageModel
    stage: TrainStage

    def __call__(self, counts: Mapping[str, Any], *, step_s: float) -> dict[str, float]:
        """Speed of a step, and how full its packed rows are.

        Args:
            counts: Its tokens, trained tokens, pairs of tokens that attend, and samples, over all
                ranks.
            step_s: Seconds that it took, with the wait for data.
        """
        tflops = self.flops(counts) / step_s / 1e12
        figures = {
            "step_s": step_s,
            "tokens_per_s": counts["tokens"] / step_s,
            "samples_per_s": counts["samples"] / step_s,
            "tflops_per_rank": tflops / dist.get_world_size(),
        }
        if self.stage.packing:
            room = self.stage.global_batch_size * self.stage.max_length
            figures["packing_fill"] = counts["tokens"] / room
        if (peak := peak_tflops()) is not None and self.stage.torch_dtype != "float32":
            figures["mfu"] = figures["tflops_per_rank"] / peak
        return figures

    def flops(self, counts: Mapping[str, Any]) -> float:
        """Floating-point operations of forward and backward in the language model."""
        trains = not self.stage.freeze_llm and self.stage.tuner_type == "full"
        passes = 3 if trains else 2  # weights that stay need no gradient of their own
        m = self.model
        heads = m.num_attention_heads * m.kv_channels
        groups = m.num_query_groups * m.kv_channels
        weights = m.hidden_size * (2 * heads + 2 * groups)
        if m.moe is None:
            weights += 3 * m.hidden_size * m.ffn_hidden_size
        else:
            width = 3 * m.moe.top_k * m.moe.ffn_hidden_size + m.moe.num_experts
            weights += m.hidden_size * width
        layers = m.num_layers * 2 * weights * counts["tokens"]
        head = 2 * m.hidden_size * m.vocab_size * counts["loss_tokens"]
        attention = m.num_layers * 4 * heads * counts["attended_pairs"]
        return float(passes * (layers + head) + 3 * attention)


def sums_and_memory(sums: Tensor) -> tuple[Tensor, float]:
    """Sums over all ranks, and the peak memory of the rank with the largest, in one reduction.

    Each rank's memory has an element of its own, which the others leave 0.

    Args:
        sums: This rank's, float64 [N].

    Returns:
        [N], and MB.
    """
    memory = sums.new_zeros(dist.get_world_size())
    memory[dist.get_rank()] = peak_memory_mb()
    everyone = torch.cat([sums, memory])
    dist.all_reduce(everyone)
    return everyone[: len(sums)], float(everyone[len(sums) :].max())


def peak_memory_mb() -> float:
    """The largest memory of this rank so far: its GPU's where there is one, else its process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peak_tflops() -> float | None:
    """Dense half-precision TFLOP/s of this GPU, where it is known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for known, peak in PEAK_TFLOPS.items() if known in name), None)
