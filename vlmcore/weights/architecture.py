"""What a checkpoint must hold, according to the transformers class that its config names."""

from __future__ import annotations

from pathlib import Path

import torch

from vlmcore.errors import WeightError
from vlmcore.families import family_of, read_config
from vlmcore.families.rows import Tied
from vlmcore.weights.safetensors_io import SafetensorsFolder

Shape = tuple[int, ...]


def architecture_shapes(model_dir: Path) -> dict[str, Shape]:
    """Key → shape of every tensor that a checkpoint of this config stores; nothing is allocated.

    Tied tensors appear once, under the key that transformers writes.
    """
    import transformers

    family = family_of(read_config(model_dir))
    config = transformers.AutoConfig.from_pretrained(model_dir)
    with torch.device("meta"):
        model = getattr(transformers, family.architecture)(config)
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    return {
        key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if key not in tied
    }


def check_against_architecture(model_dir: Path) -> None:
    """Fails where a checkpoint lacks, adds or mis-shapes a tensor.

    Servers load such checkpoints without a word and answer garbage, so this runs before serving
    too. Some tied checkpoints store the repetition of their embeddings: it has to be one.

    Raises:
        WeightError: Lists every missing, unexpected and mis-shaped tensor, and a repetition that
            differs.
    """
    expected = architecture_shapes(model_dir)
    tensors = SafetensorsFolder(model_dir)
    found = tensors.shapes
    repeated = {
        row.hf: row.to
        for row in family_of(read_config(model_dir)).rows
        if isinstance(row, Tied) and row.hf in found and row.hf not in expected
    }
    faults = [f"{key}: missing, expected {expected[key]}" for key in sorted({*expected} - {*found})]
    faults += [
        f"{key}: unexpected, found {found[key]}"
        for key in sorted({*found} - {*expected} - {*repeated})
    ]
    faults += [
        f"{key} differs from {to}, but the config says tie_word_embeddings: true; set it to false "
        f"to keep both"
        for key, to in repeated.items()
        if to in found and not torch.equal(tensors.read(key), tensors.read(to))
    ]
    faults += [
        f"{key}: shape {found[key]}, expected {expected[key]}"
        for key in sorted({*expected} & {*found})
        if tuple(found[key]) != tuple(expected[key])
    ]
    if faults:
        raise WeightError(
            f"{model_dir}: {len(faults)} tensor(s) differ from the architecture in config.json:\n  "
            + "\n  ".join(faults)
        )
