"""Attention once for each length, beside transformers' image by image."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmcore.families import FAMILIES
from vlmcore.models.vision_attention import NAME, attend_by_length

# patches (time, height, width): lengths that come again later, and in windows of Qwen2.5-VL's
GRIDS = [(1, 2, 2), (1, 12, 14), (1, 2, 2), (1, 4, 8), (1, 12, 14), (3, 4, 4), (1, 2, 16)]


def vision_side(tiny_model: Callable[..., Path], name: str) -> Any:
    import transformers

    whole = getattr(transformers, FAMILIES[name].architecture)
    return whole.from_pretrained(tiny_model(name)).model


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl", "exaone4_5"])
@pytest.mark.parametrize("grids", [GRIDS, GRIDS[:1] * 5, GRIDS[1:2]], ids=["mixed", "like", "one"])
def test_features_and_gradients_are_those_of_image_by_image(
    tiny_model: Callable[..., Path], name: str, grids: list, kernels: str
) -> None:
    before = vision_side(tiny_model, name)
    after = copy.deepcopy(before)
    attend_by_length(after)
    implementations = [m.visual.config._attn_implementation for m in (before, after)]
    assert implementations == ["sdpa", NAME]
    config = before.visual.config
    torch.manual_seed(0)
    size = config.in_channels * config.temporal_patch_size * config.patch_size**2
    pixels = torch.randn(sum(t * h * w for t, h, w in grids), size)
    found = []
    for model in (before, after):
        features = model.visual(pixels, grid_thw=torch.tensor(grids)).pooler_output
        features.square().sum().backward()
        gradients = [p.grad for p in model.visual.parameters() if p.grad is not None]
        assert len(gradients) > 20
        found.append([features.detach(), *gradients])
    for expected, one in zip(*found, strict=True):
        # a product over more rows may add up in another order
        torch.testing.assert_close(
            one, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max())
        )


@pytest.mark.parametrize("name", ["internvl", "llava", "llava_onevision"])
def test_towers_of_tiles_stay_as_they_are(tiny_model: Callable[..., Path], name: str) -> None:
    model = vision_side(tiny_model, name)
    attend_by_length(model)
    assert model.vision_tower.config._attn_implementation == "sdpa"
