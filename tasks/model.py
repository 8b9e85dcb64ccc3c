"""Donor models, and the swap that makes one model of two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks.caching import Ref, Run
from vlmcore.artifacts import BuildContext
from vlmcore.surgery.donors import donor_fingerprint, fetch_donor


def donor(run: Run, role: str, name: str, *, seed: int) -> Ref:
    """A donor's files: weights, config, tokenizer, processor. `role` is `vlm` or `llm`."""

    def build(context: BuildContext) -> None:
        fetch_donor(name, context.path, seed=seed)

    return run.stage(
        f"model.{role}",
        build,
        kind="model",
        version=1,
        params={"name": name, "fingerprint": donor_fingerprint(name), "seed": seed},
        inputs={},
    )


def swap(run: Run, *, vlm: Ref, llm: Ref, seed: int, shell: str = "auto") -> Ref:
    """The shell of `vlm`, or the one asked for, with the language model of `llm`; its proof."""

    def build(context: BuildContext) -> Mapping[str, Any]:
        from vlmcore.surgery.proof import swap_with_proof

        assert vlm is not None and llm is not None
        proof = swap_with_proof(vlm.path, llm.path, context.path, seed=seed, shell=shell)
        return {key: proof[key] for key in ("text_logits_max_diff", "vision_max_diff")}

    return run.stage(
        "swap",
        build,
        kind="swap",
        version=3,
        params={"seed": seed, "shell": shell},
        inputs={"vlm": vlm, "llm": llm},
    )
