"""What stands beside the weights of a model: config, tokenizer, processor, templates."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

Shape = tuple[int, ...]

SIDECAR = "hf"  # its folder inside a Megatron model folder
PUBLISHED = "published_shapes.json"  # in that folder: the HF tensors that its config asks for
# named one by one: a source may also hold reports and manifests, which tell of another artifact
SIDE_FILES = (
    "config.json", "generation_config.json", "*token*.json", "vocab*", "merges*", "*.model",
    "*processor*.json", "chat_template*", "*.jinja", "LICENSE*", PUBLISHED,
)  # fmt: skip


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


def record_published_shapes(sidecar: Path) -> None:
    """Writes down which HF tensors the sidecar's config asks for, so that an export need not spend
    seconds on importing transformers to learn it again."""
    from vlmcore.weights.architecture import published_shapes

    record = _asked_of(sidecar) | {"shapes": published_shapes(sidecar)}
    (sidecar / PUBLISHED).write_text(json.dumps(record) + "\n")


def published_shapes_of(sidecar: Path) -> dict[str, Shape]:
    """Key → shape of the HF tensors that the sidecar's config asks for.

    As recorded, where the config and transformers are those that the record was made with.
    """
    path = sidecar / PUBLISHED
    if path.is_file():
        record = json.loads(path.read_text())
        if _asked_of(sidecar).items() <= record.items():
            return {key: tuple(shape) for key, shape in record["shapes"].items()}
    from vlmcore.weights.architecture import published_shapes

    return published_shapes(sidecar)


def _asked_of(sidecar: Path) -> dict[str, Any]:
    """All that the shapes depend on."""
    config = (sidecar / "config.json").read_bytes()
    return {
        "config": hashlib.sha256(config).hexdigest(),
        "transformers": importlib.metadata.version("transformers"),
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
