"""config.json of a swapped model: the shell's, round the LLM's text config."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmcore.errors import WeightError
from vlmcore.families import Config, family_of, read_config
from vlmcore.surgery.shells import Shell
from vlmcore.surgery.vocabulary import Vocabulary

_OUTER = ("transformers_version", "_name_or_path", "auto_map")  # say nothing about a text model


def swapped_config(
    vlm_dir: Path, llm_dir: Path, shell: Shell, vocabulary: Vocabulary
) -> dict[str, Any]:
    """The config of `shell` with the vision side of one donor and the text side of the other.

    Raises:
        WeightError: The shell's text model ignores something that the LLM's config asks for, or the
            LLM has fewer layers than the tower gives features for.
    """
    from transformers import AutoConfig, PreTrainedConfig

    llm_config = read_config(llm_dir)
    llm = family_of(llm_config).language_model(llm_config)
    whole = AutoConfig.from_pretrained(vlm_dir).to_dict()  # complete, and nested in every version
    noise = set(PreTrainedConfig().to_dict())
    outer = {
        key: value
        for key, value in whole.items()
        if key not in noise | set(whole["text_config"])
        and not key.endswith(("_token_id", "_token_index"))
    }
    vision = {key: value for key, value in whole["vision_config"].items()
              if key not in noise or key == "model_type"}  # fmt: skip
    assert shell.family.vision is not None
    config = {
        **outer,
        **{field: vocabulary.ids[token] for field, token in shell.family.vision.tokens.items()},
        "model_type": shell.model_type,
        "architectures": [shell.family.architecture],
        "text_config": _text_config(llm_config, vlm_dir, shell)
        | {"vocab_size": vocabulary.num_rows(llm.vocab_size)},
        "vision_config": _vision_config(vision, whole["model_type"], llm.hidden_size, shell),
        "tie_word_embeddings": llm.tied_embeddings,
        "dtype": llm_config.get("dtype", llm_config.get("torch_dtype")),
    }
    _check_held(config, llm.num_layers, shell)
    return config


def scaled_section(section: Sequence[int], pairs: int) -> list[int]:
    """An M-RoPE section stretched to another number of frequency pairs; height and width alike."""
    if sum(section) == pairs:
        return list(section)
    side = math.floor(section[1] * pairs / sum(section))
    return [pairs - 2 * side, side, side]


def _text_config(llm_config: Config, vlm_dir: Path, shell: Shell) -> dict[str, Any]:
    """The LLM's own config; a shell's own text model takes its M-RoPE along.

    The frequencies (rope_theta) stay the LLM's, which its weights were trained with.
    """
    llm = family_of(llm_config).language_model(llm_config)
    text = {key: value for key, value in llm_config.items() if key not in _OUTER}
    text["tie_word_embeddings"] = llm.tied_embeddings
    if shell.text_type is None:
        return text
    vlm_config = read_config(vlm_dir)
    old = family_of(vlm_config).language_model(vlm_config)
    for spread in ("architectures", "rope_theta", "rope_scaling"):
        text.pop(spread, None)
    text["model_type"] = shell.text_type
    text["rope_parameters"] = {
        **llm.rope,
        "mrope_section": scaled_section(old.mrope_section, llm.kv_channels // 2),
    }
    if old.mrope_interleaved:
        text["rope_parameters"]["mrope_interleaved"] = True
    return text


def _vision_config(
    vision: Mapping[str, Any], vlm_type: str, hidden_size: int, shell: Shell
) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    if "out_hidden_size" in vision:  # Qwen's towers end in the text's width
        changed["out_hidden_size"] = hidden_size
    if vlm_type != shell.model_type:
        changed["model_type"] = shell.vision_type
        changed |= {field: vision[source] for field, source in shell.vision_from.items()}
    return {**vision, **changed}


def _check_held(config: Mapping[str, Any], num_layers: int, shell: Shell) -> None:
    text, vision = config["text_config"], config["vision_config"]
    faults = [
        f"{field} is {text.get(field)!r}, but {shell.family.architecture} always computes {value!r}"
        for field, value in shell.needs.items()
        if text.get(field) != value
    ]
    depth = len(vision.get("deepstack_visual_indexes") or ())
    if depth > num_layers:
        faults.append(
            f"num_hidden_layers is {num_layers}, but the tower's {depth} deepstack features enter "
            f"behind the first {depth} layers"
        )
    if faults:
        raise WeightError(
            f"this LLM cannot be held by {shell.model_type}:\n  "
            + "\n  ".join(faults)
            + "\ntake an LLM for which this holds"
        )
