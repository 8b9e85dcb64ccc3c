"""The swap proof: figures that show the swapped model is the donors' and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vlmcore.errors import ProofError
from vlmcore.families import family_of, read_config
from vlmcore.surgery.swap import SwapLedger

TEXT = "The swapped model must answer text exactly as its donor does: 0123456789."


def prove_swap(swapped: Path, vlm_dir: Path, llm_dir: Path, ledger: SwapLedger) -> dict[str, Any]:
    """Measures the swap on the reloaded checkpoint, in fp32.

    Returns:
        `text_logits_max_diff` (expected 0.0), `vision_max_diff` of the tower's output before the
        merger (expected 0.0), missing and unexpected keys of the reload, the classes of the
        language and vision modules, and the ledger.

    Raises:
        ProofError: A figure differs from what is expected; the message holds all of them.
    """
    import transformers

    swapped_class = getattr(transformers, family_of(read_config(swapped)).architecture)
    model, info = swapped_class.from_pretrained(
        swapped, dtype=torch.float32, output_loading_info=True
    )
    vlm = getattr(transformers, family_of(read_config(vlm_dir)).architecture).from_pretrained(
        vlm_dir, dtype=torch.float32
    )
    llm = getattr(transformers, family_of(read_config(llm_dir)).architecture).from_pretrained(
        llm_dir, dtype=torch.float32
    )
    figures: dict[str, Any] = {
        "text_logits_max_diff": _text_difference(model.eval(), llm.eval(), llm_dir),
        "vision_max_diff": _vision_difference(model, vlm.eval()),
        "missing_keys": sorted(info["missing_keys"]),
        "unexpected_keys": sorted(info["unexpected_keys"]),
        "language_class": type(model.model.language_model).__name__,
        "vision_class": type(model.model.visual).__name__,
        "ledger": ledger.to_json(),
    }
    expected = {
        "text_logits_max_diff": 0.0,
        "vision_max_diff": 0.0,
        "missing_keys": [],
        "unexpected_keys": [],
        "language_class": type(vlm.model.language_model).__name__,
        "vision_class": type(vlm.model.visual).__name__,
    }
    faults = [
        f"{name}: {figures[name]}, expected {value}"
        for name, value in expected.items()
        if figures[name] != value
    ]
    if faults:
        raise ProofError("the swap proof failed:\n  " + "\n  ".join(faults))
    return figures


@torch.no_grad()
def _text_difference(model: Any, llm: Any, llm_dir: Path) -> float:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(llm_dir)(TEXT, return_tensors="pt")["input_ids"]
    return float((model(input_ids=ids).logits - llm(input_ids=ids).logits).abs().max())


@torch.no_grad()
def _vision_difference(model: Any, vlm: Any) -> float:
    """Largest difference of the towers' outputs before the merger, on a seeded image."""
    config = vlm.config.vision_config
    grid = torch.tensor([[1, 4 * config.spatial_merge_size, 6 * config.spatial_merge_size]])
    patch = config.in_channels * config.temporal_patch_size * config.patch_size**2
    pixels = torch.randn(int(grid.prod()), patch, generator=torch.Generator().manual_seed(0))
    ours = model.model.visual(pixels, grid_thw=grid).last_hidden_state
    theirs = vlm.model.visual(pixels, grid_thw=grid).last_hidden_state
    return float((ours - theirs).abs().max())
