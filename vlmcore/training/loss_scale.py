"""One loss scale for the optimizer of the experts and that of the rest.

Megatron-Core 0.16 gives each of them a scaler that hears of its own overflows alone, while the loss
is multiplied by the first one's scale: after an overflow in the experts their gradients would be
divided by another factor than they were multiplied with. It ends when Megatron's optimizers share.
"""

from __future__ import annotations

from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.grad_scaler import DynamicGradScaler


class SharedGradScaler(DynamicGradScaler):
    """Megatron's rules, applied once a step to what all its optimizers found.

    Args:
        config: Has the first scale, and what moves it.
        num_optimizers: How many say in each step whether their gradients overflowed.
    """

    def __init__(self, config: OptimizerConfig, *, num_optimizers: int) -> None:
        super().__init__(
            initial_scale=config.initial_loss_scale,
            min_scale=config.min_loss_scale,
            growth_factor=2.0,
            backoff_factor=0.5,
            growth_interval=config.loss_scale_window,
            hysteresis=config.hysteresis,
        )
        self.num_optimizers = num_optimizers
        self._found: list[bool] = []

    def update(self, found_inf: bool) -> None:
        """Takes one optimizer's word; the step's last one moves the scale, which all divide by."""
        self._found.append(found_inf)
        if len(self._found) == self.num_optimizers:
            super().update(any(self._found))
            self._found.clear()
