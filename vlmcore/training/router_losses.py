"""What the routers of experts add to the loss: its weight, and its value for the log."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import (
    clear_aux_losses_tracker,
    get_moe_layer_wise_logging_tracker,
    reduce_aux_losses_tracker_across_ranks,
)
from megatron.core.transformer.transformer_config import TransformerConfig

_NAMES = {"load_balancing_loss": "aux_loss", "z_loss": "z_loss"}


@dataclass(frozen=True)
class RouterLosses:
    """Coefficients of a stage, kept true to their meaning: what is added to a mean over tokens.

    Megatron-Core 0.16 multiplies a router's loss by the tokens of its row (the z-loss by those of
    its part of the row), then divides by all trained tokens. Left alone, a coefficient would weigh
    more the fewer tokens are trained on: fivefold in chats whose answers are a fifth.
    """

    config: TransformerConfig
    moe_aux_loss_coeff: float
    moe_z_loss_coeff: float

    def weigh(self, *, tokens: int, loss_tokens: int) -> None:
        """Sets the coefficients of the step that follows, given its counts over all ranks."""
        parts = parallel_state.get_tensor_and_context_parallel_group().size()
        scale = loss_tokens / max(tokens, 1)
        self.config.moe_aux_loss_coeff = self.moe_aux_loss_coeff * scale
        self.config.moe_z_loss_coeff = self.moe_z_loss_coeff * scale * parts or None

    def collect(self, *, num_micro_batches: int) -> dict[str, float]:
        """The unweighted losses since the last call, as means over layers and micro batches."""
        reduce_aux_losses_tracker_across_ranks()
        tracker = get_moe_layer_wise_logging_tracker()
        found = {
            _NAMES[name]: float(entry["values"].sum())
            / (self.config.num_layers * num_micro_batches)
            for name, entry in tracker.items()
        }
        clear_aux_losses_tracker()
        return found
