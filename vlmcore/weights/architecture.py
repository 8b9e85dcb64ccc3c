"""What a checkpoint must hold, according to the transformers class that its config names."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from vlmcore.errors import WeightError
from vlmcore.families import Family, LanguageModel, family_of, read_config
from vlmcore.families.rows import Drop, StackExperts, Tied
from vlmcore.weights.experts import experts_layout, fused_shapes, per_expert_shapes
from vlmcore.weights.safetensors_io import SafetensorsFolder

Shape = tuple[int, ...]


def architecture_shapes(model_dir: Path) -> dict[str, Shape]:
    """Key → shape of every tensor that a model of this config holds in memory; tied tensors once.

    Transformers builds the model on the meta device, where nothing is allocated. Importing it takes
    seconds, so the answer is kept under `$XDG_CACHE_HOME/vlmflow` for this very config and version.
    """
    text = (model_dir / "config.json").read_bytes()
    version = importlib.metadata.version("transformers")
    name = hashlib.sha256(text + version.encode()).hexdigest()
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    kept = Path(root) / "vlmflow" / "architectures" / f"{name}.json"
    try:
        return {key: tuple(shape) for key, shape in json.loads(kept.read_text()).items()}
    except (OSError, ValueError):  # not there, or not written whole
        shapes = _built_shapes(model_dir)
    with contextlib.suppress(OSError):  # a home that cannot be written costs seconds, no more
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(shapes))
        partial.replace(kept)
    return shapes


def _built_shapes(model_dir: Path) -> dict[str, Shape]:
    import torch
    import transformers

    family = family_of(read_config(model_dir))
    config = transformers.AutoConfig.from_pretrained(model_dir)
    with torch.device("meta"):
        model = getattr(transformers, family.architecture)(config)
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    return {
        key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if key not in tied
    }


def published_shapes(model_dir: Path) -> dict[str, Shape]:
    """Key → shape of every tensor in the form of the family's published checkpoints.

    That form is what every loader and server reads, so exports are written in it.
    """
    config = read_config(model_dir)
    family = family_of(config)
    model = family.language_model(config)
    memory = architecture_shapes(model_dir)
    published: dict[str, Shape] = {}
    for key, shape in memory.items():
        prefix, _, name = key.rpartition(".")
        if name == "gate_up_proj":
            published |= _published_experts(f"{prefix}.", family, model)
        elif name != "down_proj":
            published[family.disk_key(key)] = shape
    return published


def _published_experts(prefix: str, family: Family, model: LanguageModel) -> dict[str, Shape]:
    assert model.moe is not None
    prefix = family.disk_key(prefix)
    if family.input_first_experts:
        return fused_shapes(prefix, model.moe, model.hidden_size, input_first=True)
    return per_expert_shapes(prefix, model.moe, model.hidden_size)


def check_against_architecture(model_dir: Path) -> None:
    """Fails where a checkpoint lacks, adds or mis-shapes a tensor.

    Servers load such checkpoints without a word and answer garbage, so this runs before serving
    too. Some tied checkpoints store the repetition of their embeddings: it has to be one.

    Raises:
        WeightError: Lists every missing, unexpected and mis-shaped tensor, and a repetition that
            differs.
    """
    config = read_config(model_dir)
    family = family_of(config)
    tensors = SafetensorsFolder(model_dir)
    found = {family.memory_key(key): key for key in tensors}
    expected = architecture_shapes(model_dir)
    repeated = {
        row.hf: row.to
        for row in family.rows(config)
        if isinstance(row, Tied) and row.hf in found and row.hf not in expected
    }

    def name(key: str) -> str:
        return found.get(key, family.disk_key(key))

    shapes = {key: tensors[stored].shape for key, stored in found.items()}
    experts, faults = _expert_faults(family, config, shapes, name)
    dropped = re.compile(
        "|".join(
            re.escape(row.hf).replace(r"\{layer\}", r"\d+")
            for row in family.rows(config)
            if isinstance(row, Drop)
        )
    )
    outside = {key for key in found if not (key.startswith(experts) or dropped.fullmatch(key))}
    wanted = {key for key in expected if not key.startswith(experts)}
    faults += [
        f"{name(key)}: missing, expected {expected[key]}" for key in sorted(wanted - outside)
    ]
    faults += [
        f"{name(key)}: unexpected, found {tensors[found[key]].shape}"
        for key in sorted(outside - wanted - {*repeated})
    ]
    faults += [
        f"{name(key)} differs from {name(to)}, but the config says tie_word_embeddings: true; set "
        f"it to false to keep both"
        for key, to in repeated.items()
        if to in found and not tensors.read(found[key]).equal(tensors.read(found[to]))
    ]
    faults += [
        f"{name(key)}: shape {tensors[found[key]].shape}, expected {expected[key]}"
        for key in sorted(wanted & outside)
        if tensors[found[key]].shape != expected[key]
    ]
    if faults:
        raise WeightError(
            f"{model_dir}: {len(faults)} tensor(s) differ from the architecture in config.json:\n  "
            + "\n  ".join(faults)
        )


def _expert_faults(
    family: Family,
    config: Mapping[str, object],
    shapes: Mapping[str, Shape],
    name: Callable[[str], str],
) -> tuple[tuple[str, ...], list[str]]:
    """Prefixes of the experts' keys in memory, and what is wrong below them in any layout."""
    model = family.language_model(config)
    stacks = [row.hf for row in family.rows(config) if isinstance(row, StackExperts)]
    prefixes = tuple(
        stack.replace("{layer}", str(layer))
        for stack in stacks
        for layer in range(model.num_layers)
    )
    faults: list[str] = []
    for prefix in prefixes:
        assert model.moe is not None
        below = {key: shape for key, shape in shapes.items() if key.startswith(prefix)}
        layout = experts_layout(
            prefix, below, moe=model.moe, hidden_size=model.hidden_size, name=name
        )
        faults += layout.faults
    return prefixes, faults
