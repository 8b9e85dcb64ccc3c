"""A vision tower's patches projected by one matrix product instead of a convolution.

Qwen's processors cut an image into patches of just the kernel's size, so there is nothing to slide
over; torch's convolution (2.13) takes twice as long on a CPU, and more where patches are few. It
ends when transformers' towers project by a linear layer.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PatchProjection(nn.Conv3d):
    """A convolution over inputs that are as large as its kernel, [patches, channels, *kernel]."""

    def forward(self, input: Tensor) -> Tensor:
        """[patches, width, 1, 1, 1]."""
        if input.shape[2:] != self.kernel_size:
            return super().forward(input)
        out = F.linear(input.flatten(1), self.weight.flatten(1), self.bias)
        return out[..., None, None, None]


def project_by_product(vision_model: nn.Module) -> None:
    """Changes every such convolution of a vision side; the weights stay what they are."""
    for module in vision_model.modules():
        if type(module) is nn.Conv3d and module.kernel_size == module.stride:
            module.__class__ = PatchProjection
