"""Model families: one file each, data only. `family_of` finds the one a config belongs to."""

import json
from pathlib import Path

from vlmcore.errors import WeightError
from vlmcore.families import (
    exaone4_5,
    internvl,
    llama,
    llava,
    llava_onevision,
    qwen2,
    qwen2_5_vl,
    qwen3,
    qwen3_moe,
    qwen3_vl,
    qwen3_vl_moe,
)
from vlmcore.families.base import (
    Config,
    Family,
    FreezeGroup,
    LanguageModel,
    MixtureOfExperts,
    Vision,
)

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY
    for module in (exaone4_5, internvl, llama, llava, llava_onevision, qwen2, qwen2_5_vl, qwen3,
                   qwen3_moe, qwen3_vl, qwen3_vl_moe)
}  # fmt: skip


def family_of(config: Config) -> Family:
    """The family of an HF config.

    Raises:
        WeightError: `model_type` is missing or no family file covers it.
    """
    found = config.get("model_type")
    if found not in FAMILIES:
        raise WeightError(
            f"config.json: model_type {found!r} has no family; known: "
            f"{', '.join(sorted(FAMILIES))}. Add a file under vlmcore/families."
        )
    return FAMILIES[found]


def read_config(model_dir: Path) -> Config:
    """config.json of an HF model folder.

    Raises:
        WeightError: The folder has no readable config.json.
    """
    path = model_dir / "config.json"
    try:
        config: Config = json.loads(path.read_text())
    except FileNotFoundError:
        raise WeightError(
            f"{path} is missing; expected an HF model folder with config.json and *.safetensors"
        ) from None
    except json.JSONDecodeError as error:
        raise WeightError(f"{path}: not JSON ({error})") from None
    return config


__all__ = ["FAMILIES", "Config", "Family", "FreezeGroup", "LanguageModel", "MixtureOfExperts",
           "Vision", "family_of", "read_config"]  # fmt: skip
