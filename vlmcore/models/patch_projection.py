"""A vision tower's patches projected by one matrix product instead of a convolution.

Qwen's processors cut media into patches of just the kernel's size, so there is nothing to slide
over; torch's convolution (2.13) takes twice as long on a CPU, and more where patches are few. It
ends when transformers' towers project by a linear layer.

A patch spans several frames of a video. An image is one frame, which transformers' processors
repeat; ours (`vlmcore.dataloading.media`) leave it single, and the weights of all frames are summed
instead: half the pixels to make, send and multiply.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchProjection(nn.Conv3d):
    """A convolution over inputs that are as large as its kernel, or one frame of it."""

    def forward(self, input: Tensor) -> Tensor:
        """[patches, width], from [patches, channels · frames · height · width]."""
        weight = self.weight
        frames = weight[0].numel() // input.shape[1]
        if frames > 1 and weight.dtype is torch.float32:
            weight = weight.sum(2)
        elif frames > 1:  # a sum of weights would be rounded
            input = input.unflatten(1, (len(weight[0]), 1, -1)).expand(-1, -1, frames, -1)
        return F.linear(input.flatten(1), weight.flatten(1), self.bias)


class _PatchEmbed(nn.Module):
    proj: PatchProjection

    def forward(self, hidden_states: Tensor) -> Tensor:
        out: Tensor = self.proj(hidden_states.to(self.proj.weight.dtype))
        return out


def project_by_product(vision_model: nn.Module) -> None:
    """Has a tower that is given whole patches project them so; the weights stay what they are."""
    for module in vision_model.modules():
        projection = getattr(module, "proj", None)
        if type(module).__name__.endswith("PatchEmbed") and type(projection) is nn.Conv3d:
            module.__class__, projection.__class__ = _PatchEmbed, PatchProjection
