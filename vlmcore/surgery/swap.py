"""The LLM swap: a vision-language shell keeps its eyes and gets another language model.

The swapped checkpoint is put together tensor by tensor, by name: every tensor of the donor LLM
moves in, every vision tensor whose shape still fits stays, and what the new width makes unfit (the
aligner's layers that end in it) starts from a seeded draw and is listed. Nothing else is possible:
the ledger closes or the swap fails.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from vlmcore.families import family_of, read_config
from vlmcore.surgery.donor import Donor
from vlmcore.surgery.merge import Merge, SwapLedger
from vlmcore.surgery.shells import AUTO, Shell, choose_shell
from vlmcore.surgery.swapped_config import swapped_config
from vlmcore.surgery.vocabulary import write_tokenizer
from vlmcore.weights.architecture import check_against_architecture, published_shapes
from vlmcore.weights.safetensors_io import parse_size, write_sharded

LEDGER = "swap_ledger.json"


def swap_llm(
    vlm_dir: Path,
    llm_dir: Path,
    target: Path,
    *,
    seed: int,
    shell: str = AUTO,
    max_shard_size: str = "4GB",
) -> SwapLedger:
    """Writes the shell of `vlm_dir` with the language model of `llm_dir` into `target`.

    Args:
        vlm_dir: HF folder of the vision-language donor.
        llm_dir: HF folder of the LLM donor.
        target: New HF folder: weights in the shell's published form, config, tokenizer, processor,
            generation config, ledger.
        seed: Seed of the tensors that start random.
        shell: Family of the class that is to hold them, or `auto`: the vision donor's own.
        max_shard_size: Data of one safetensors file at most.

    Raises:
        WeightError: No stock class holds this pair exactly, a donor's checkpoint is damaged, or the
            ledger does not close.
    """
    held_by = choose_shell(family_of(read_config(vlm_dir)), family_of(read_config(llm_dir)), shell)
    for donor in (vlm_dir, llm_dir):
        check_against_architecture(donor)
    vocabulary = write_tokenizer(vlm_dir, llm_dir, target, held_by)
    config = swapped_config(vlm_dir, llm_dir, held_by, vocabulary)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _write_processor(vlm_dir, target, held_by)
    generation = llm_dir / "generation_config.json"  # its end-of-turn tokens are the LLM's
    if generation.is_file():
        shutil.copyfile(generation, target / generation.name)
    shapes = published_shapes(target)
    merge = Merge(
        Donor(vlm_dir),
        Donor(llm_dir),
        shell=held_by,
        config=config,
        shapes=shapes,
        vocabulary=vocabulary,
        seed=seed,
    )
    tensors = {key: (shape, merge.dtype(key)) for key, shape in shapes.items()}
    write_sharded(target, tensors, merge.read, max_shard_bytes=parse_size(max_shard_size))
    ledger = merge.ledger()
    (target / LEDGER).write_text(json.dumps(ledger.to_json(), indent=1) + "\n")
    return ledger


def _write_processor(vlm_dir: Path, target: Path, shell: Shell) -> None:
    """The vision donor's processor files, under the name of the shell's own processor class."""
    for path in sorted(vlm_dir.glob("*processor*.json")):
        content = json.loads(path.read_text())
        content.pop("chat_template", None)
        if shell.processor is not None and "processor_class" in content:
            content["processor_class"] = shell.processor
        (target / path.name).write_text(json.dumps(content, indent=2) + "\n")
