"""`vlmflow swap`: one donor's language model in the shell of another, proven, in one folder."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flows.json_output import print_json
from vlmcore.errors import WeightError


def swap(
    vlm: Annotated[
        str,
        typer.Option(
            metavar="A",
            help="Donor of the vision tower: an HF id, a folder, `modelscope:ID`, `builtin:NAME`.",
        ),
    ],
    llm: Annotated[str, typer.Option(metavar="B", help="Donor of the language model, likewise.")],
    out: Annotated[Path, typer.Option(metavar="C", help="Folder to write; must not exist yet.")],
    seed: Annotated[int, typer.Option(help="Of the tensors that start random.")] = 0,
    shell: Annotated[
        str,
        typer.Option(
            help="Family of the class that holds the result: auto is A's own; exaone4_5 holds "
            "Qwen2.5-VL's tower with any LLM."
        ),
    ] = "auto",
    json_: Annotated[bool, typer.Option("--json", help="Print the proof on stdout.")] = False,
) -> None:
    """Put another language model into a vision-language model, and prove that nothing was lost.

    Every tensor of B moves in by name; the tensors that must start random are listed. The proof
    compares text with B and vision with A on the reloaded result, and C appears only if it holds.
    """
    import vlmcore  # noqa: F401 - before transformers: installs remedies
    from vlmcore.surgery.donors import donor_folder
    from vlmcore.surgery.proof import swap_with_proof

    began = time.perf_counter()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WeightError(f"--out {out} exists already; name a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        donors = [
            donor_folder(name, Path(scratch) / role, seed=seed)
            for role, name in (("vlm", vlm), ("llm", llm))
        ]
        built = Path(scratch) / "swapped"
        proof = swap_with_proof(*donors, built, seed=seed, shell=shell)
        built.rename(out)  # last: a folder of this name is whole and proven
    if json_:
        seconds = round(time.perf_counter() - began, 3)
        print_json({"out": str(out), "wall_s": seconds, **proof})
        return
    ledger = proof["ledger"]
    console = Console(stderr=True)
    console.print(
        f"{out}: {ledger['shell']}, {ledger['from_llm']} tensors of the LLM, {ledger['from_vlm']} "
        f"of the vision donor; text logits differ by {proof['text_logits_max_diff']}, vision by "
        f"{proof['vision_max_diff']}",
        highlight=False,
        soft_wrap=True,
    )
    for title, rows in (("starts random", ledger["fresh"]), ("new token", ledger["new_tokens"])):
        for name, reason in rows.items():
            console.print(f"  {title}: {name}: {reason}", highlight=False, soft_wrap=True)
