"""Donor models, and the swap that makes one model of two."""

from __future__ import annotations

import json
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


def swap(run: Run, *, vlm: Ref, llm: Ref, seed: int) -> Ref:
    """The shell of `vlm` with the language model of `llm`, and its proof."""

    def build(context: BuildContext) -> Mapping[str, Any]:
        from transformers.utils.logging import disable_progress_bar

        from vlmcore.surgery.proof import prove_swap
        from vlmcore.surgery.swap import swap_llm

        assert vlm is not None and llm is not None
        disable_progress_bar()  # one bar a donor says nothing beside our own
        ledger = swap_llm(vlm.path, llm.path, context.path, seed=seed)
        proof = prove_swap(context.path, vlm.path, llm.path, ledger)
        (context.path / "proof.json").write_text(json.dumps(proof, indent=1) + "\n")
        return {key: proof[key] for key in ("text_logits_max_diff", "vision_max_diff")}

    return run.stage(
        "swap",
        build,
        kind="swap",
        version=2,
        params={"seed": seed},
        inputs={"vlm": vlm, "llm": llm},
    )
