"""What stands beside the weights of a model: config, tokenizer, processor, templates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

SIDECAR = "hf"  # its folder inside a Megatron model folder
# named one by one: a source may also hold reports and manifests, which tell of another artifact
SIDE_FILES = (
    "config.json", "generation_config.json", "*token*.json", "vocab*", "merges*", "*.model",
    "*processor*.json", "chat_template*", "*.jinja", "LICENSE*",
)  # fmt: skip


def config_dir(model_dir: Path) -> Path:
    """Where config, tokenizer and processor of a Megatron or HF model folder stand."""
    sidecar = model_dir / SIDECAR
    return sidecar if sidecar.is_dir() else model_dir


def copy_sidecar(source: Path, target: Path) -> None:
    """Copies what stands beside the weights."""
    target.mkdir(parents=True, exist_ok=True)
    for pattern in SIDE_FILES:
        for path in sorted(source.glob(pattern)):
            shutil.copyfile(path, target / path.name)


def leave_quantization_out(config_path: Path) -> None:
    """Takes the quantization out of a config whose weights were dequantized."""
    config = json.loads(config_path.read_text())
    if config.pop("quantization_config", None) is not None:
        _write_json(config_path, config)


def record_dtype(config_path: Path, dtype: str) -> None:
    """Writes the dtype into a config, so that loaders and servers compute in it."""
    config = json.loads(config_path.read_text())
    for part in (config, config.get("text_config"), config.get("vision_config")):
        if isinstance(part, dict):
            for field in {"dtype", "torch_dtype"} & set(part) or {"dtype"}:
                part[field] = dtype
    _write_json(config_path, config)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
