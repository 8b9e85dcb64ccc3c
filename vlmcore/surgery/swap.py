"""The LLM swap: a vision-language shell keeps its eyes and gets another language model.

The swapped checkpoint is put together tensor by tensor, by name: every tensor of the donor LLM
moves in, every vision tensor whose shape still fits stays, and what the new width makes unfit (the
last layer of each merger) starts from a seeded draw and is listed. Nothing else is possible: the
ledger closes or the swap fails.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmcore.errors import WeightError
from vlmcore.families import Config, Family, family_of, read_config
from vlmcore.weights.architecture import architecture_shapes, check_against_architecture
from vlmcore.weights.convert import copy_sidecar
from vlmcore.weights.safetensors_io import SafetensorsFolder, parse_size, write_sharded

# (shell, LLM) pairs whose text model computes what the LLM computes (measured, docs/families.md)
EXACT_SHELLS = {("qwen3_vl", "qwen3")}


@dataclass(frozen=True)
class SwapLedger:
    """Where every tensor of the swapped model comes from; `fresh` ones start random."""

    from_llm: Mapping[str, str]  # swapped key → LLM key
    from_vlm: tuple[str, ...]
    fresh: Mapping[str, str]  # swapped key → why it starts random

    def to_json(self) -> dict[str, Any]:
        """Counts, and the names of the fresh tensors."""
        return {
            "from_llm": len(self.from_llm),
            "from_vlm": len(self.from_vlm),
            "fresh": dict(self.fresh),
        }


def swap_llm(
    vlm_dir: Path, llm_dir: Path, target: Path, *, seed: int, max_shard_size: str = "4GB"
) -> SwapLedger:
    """Writes the shell of `vlm_dir` with the language model of `llm_dir` into `target`.

    Args:
        vlm_dir: HF folder of the vision-language donor.
        llm_dir: HF folder of the LLM donor.
        target: New HF folder: weights, config, tokenizer, processor, generation config.
        seed: Seed of the tensors that start random.
        max_shard_size: Data of one safetensors file at most.

    Raises:
        WeightError: No stock class holds this pair exactly, the LLM's tokenizer lacks an image
            token, a donor's checkpoint is damaged, or the ledger does not close.
    """
    vlm_config, llm_config = read_config(vlm_dir), read_config(llm_dir)
    shell, llm = family_of(vlm_config), family_of(llm_config)
    _check_pair(shell, llm)
    for donor in (vlm_dir, llm_dir):
        check_against_architecture(donor)
    _write_side_files(vlm_dir, llm_dir, target, shell, vlm_config, llm_config)
    shapes = architecture_shapes(target)
    vlm, text = SafetensorsFolder(vlm_dir), SafetensorsFolder(llm_dir)
    # a tied LLM may store a repetition of its embeddings, which is no part of its architecture
    from_llm = {_key_in_shell(key, shell, llm): key for key in architecture_shapes(llm_dir)}
    ledger = _ledger(shell, llm, shapes, vlm, text, from_llm)

    dtype = text[next(iter(ledger.from_llm.values()))].dtype
    generator = torch.Generator().manual_seed(seed)
    std = float(vlm_config.get("initializer_range") or 0.02)

    def read(key: str) -> Tensor:
        if key in ledger.from_llm:
            return text.read(ledger.from_llm[key])
        if key in ledger.fresh:
            return _fresh(key, shapes[key], std=std, generator=generator).to(dtype)
        return vlm.read(key)

    def stored_dtype(key: str) -> torch.dtype:
        if key in ledger.from_llm:
            return text[ledger.from_llm[key]].dtype
        return dtype if key in ledger.fresh else vlm[key].dtype

    tensors = {key: (shape, stored_dtype(key)) for key, shape in shapes.items()}
    write_sharded(target, tensors, read, max_shard_bytes=parse_size(max_shard_size))
    (target / "swap_ledger.json").write_text(json.dumps(asdict(ledger), indent=1) + "\n")
    return ledger


def _check_pair(shell: Family, llm: Family) -> None:
    if shell.vision is None:
        raise WeightError(f"model.vlm is a {shell.model_type}, which has no vision tower")
    if (shell.model_type, llm.model_type) not in EXACT_SHELLS:
        pairs = "; ".join(f"{b} into {a}" for a, b in sorted(EXACT_SHELLS))
        raise WeightError(
            f"no stock class holds a {llm.model_type} exactly inside {shell.model_type}; these "
            f"pairs are exact: {pairs}"
        )


def _ledger(
    shell: Family,
    llm: Family,
    shapes: Mapping[str, tuple[int, ...]],
    vlm: SafetensorsFolder,
    text: SafetensorsFolder,
    from_llm: Mapping[str, str],
) -> SwapLedger:
    unplaced = sorted(key for home, key in from_llm.items() if home not in shapes)
    from_vlm, fresh, faults = [], {}, [f"{key}: the shell has no place for it" for key in unplaced]
    for key, shape in shapes.items():
        source: Mapping[str, Any] = text if key in from_llm else vlm
        found = source.get(from_llm.get(key, key))
        if shell.group_of(key) == "llm":
            if found is None or key not in from_llm:
                faults.append(f"{key}: the LLM donor has no tensor for it")
            elif found.shape != shape:
                faults.append(f"{key}: shape {found.shape} in the donor, expected {shape}")
        elif found is not None and found.shape == shape:
            from_vlm.append(key)
        elif shell.group_of(key) == "aligner":
            before = "absent" if found is None else f"shape {found.shape}"
            fresh[key] = f"{before} in the vision donor, {shape} here"
        else:
            faults.append(f"{key}: the vision donor has no tensor of shape {shape} for it")
    if faults:
        raise WeightError(
            f"{llm.model_type} into {shell.model_type}: {len(faults)} tensor(s) do not fit:\n  "
            + "\n  ".join(faults)
        )
    return SwapLedger(from_llm, tuple(from_vlm), fresh)


def _key_in_shell(key: str, shell: Family, llm: Family) -> str:
    if key.startswith(llm.text_hf_prefix):
        return shell.text_hf_prefix + key.removeprefix(llm.text_hf_prefix)
    return key


def _fresh(key: str, shape: tuple[int, ...], *, std: float, generator: torch.Generator) -> Tensor:
    """What transformers initialises such a tensor to: zeros for biases, a normal draw otherwise."""
    if key.endswith(".bias"):
        return torch.zeros(shape)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def _write_side_files(
    vlm_dir: Path, llm_dir: Path, target: Path, shell: Family, vlm: Config, llm: Config
) -> None:
    """Config, the LLM's tokenizer and generation config, the shell's processor and template."""
    copy_sidecar(llm_dir, target)
    assert shell.vision is not None
    for path in sorted(vlm_dir.glob("*")):
        shell_owned = "processor" in path.name or path.name.startswith("chat_template")
        if path.is_file() and shell_owned:
            (target / path.name).write_bytes(path.read_bytes())
    config = _swapped_config(vlm, llm, _image_token_ids(target, shell))
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _image_token_ids(target: Path, shell: Family) -> dict[str, int]:
    from transformers import AutoTokenizer

    assert shell.vision is not None
    vocabulary = AutoTokenizer.from_pretrained(target).get_vocab()
    names = {
        "image_token_id": shell.vision.image_token,
        "video_token_id": shell.vision.video_token,
        "vision_start_token_id": shell.vision.vision_start_token,
        "vision_end_token_id": shell.vision.vision_end_token,
    }
    missing = sorted(name for name in names.values() if name not in vocabulary)
    if missing:
        raise WeightError(
            f"the LLM donor's tokenizer lacks {', '.join(missing)}; take an LLM whose vocabulary "
            f"holds the shell's image tokens"
        )
    return {field: vocabulary[name] for field, name in names.items()}


def _swapped_config(vlm: Config, llm: Config, token_ids: Mapping[str, int]) -> dict[str, Any]:
    """The shell's config around the LLM's text config; rope_theta stays the LLM's."""
    outer = {"model_type", "architectures", "transformers_version", "_name_or_path"}
    old_text = vlm["text_config"]
    text = {key: value for key, value in llm.items() if key not in outer}
    text["model_type"] = old_text["model_type"]
    rope = dict(llm.get("rope_parameters") or {})
    rope.setdefault("rope_type", "default")
    rope.setdefault("rope_theta", llm.get("rope_theta", 10_000.0))
    old_rope = old_text.get("rope_parameters") or old_text.get("rope_scaling") or {}
    head_dim = llm.get("head_dim") or llm["hidden_size"] // llm["num_attention_heads"]
    rope["mrope_section"] = scaled_section(old_rope["mrope_section"], head_dim // 2)
    rope["mrope_interleaved"] = bool(old_rope.get("mrope_interleaved", False))
    text["rope_parameters"] = rope
    tied = bool(llm.get("tie_word_embeddings", False))
    return {
        **{key: value for key, value in vlm.items() if key != "_name_or_path"},
        **token_ids,
        "text_config": text,
        "vision_config": {**vlm["vision_config"], "out_hidden_size": llm["hidden_size"]},
        "tie_word_embeddings": tied,
        "dtype": llm.get("dtype", llm.get("torch_dtype")),
    }


def scaled_section(section: list[int], pairs: int) -> list[int]:
    """An M-RoPE section stretched to another number of frequency pairs; height and width alike."""
    if sum(section) == pairs:
        return list(section)
    side = math.floor(section[1] * pairs / sum(section))
    return [pairs - 2 * side, side, side]
