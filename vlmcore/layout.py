"""How one model lies over ranks: the sizes of Megatron-Core's parallel groups, as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the parallel groups, under Megatron's names; ranks beyond them are replicas.

    Attributes:
        virtual_pipeline_model_parallel_size: Model chunks that each pipeline stage holds.
        context_parallel_size: Ranks that hold the tokens of one row together.
        expert_model_parallel_size: Parts that the experts of a layer are dealt into.
        expert_tensor_parallel_size: Parts that each expert is cut into; the tensor parallel size
            of the rest has no say in it.
        sequence_parallel: Split the norms' activations over the tensor parallel ranks too.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1
    sequence_parallel: bool = False

    def __str__(self) -> str:
        names = {
            "tensor": "tp", "pipeline": "pp", "virtual": "vpp", "context": "cp",
            "expert_model": "ep",
        }  # fmt: skip
        parts = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            short = next((s for n, s in names.items() if field.name.startswith(n)), "etp")
            parts.append("sp" if value is True else f"{short}{value}")
        return "-".join(parts) or "one rank"

    @property
    def num_ranks(self) -> int:
        """Ranks of one replica of the model."""
        experts = self.expert_model_parallel_size * self.expert_tensor_parallel_size
        return self.pipeline_model_parallel_size * math.lcm(
            self.tensor_model_parallel_size * self.context_parallel_size, experts
        )


def ranks_for(layouts: Iterable[Layout]) -> int:
    """The fewest ranks on which every one of these layouts has whole replicas."""
    return math.lcm(*(layout.num_ranks for layout in layouts))
