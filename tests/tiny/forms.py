"""The key forms one checkpoint can stand in: transformers' memory, and what hubs hold.

Memory form is `state_dict()` of transformers 5 without a tied lm_head: `model.language_model.…`,
fused experts `[E, 2I, H]` and `[E, H, I]`. Hub form is what transformers 4 wrote, which most
published checkpoints are in. It differs by

- prefixes: Qwen2.5-VL has `model.…` and `visual.…`; InternVL and LLaVA `language_model.model.…`,
  `language_model.lm_head`, and towers beside them, CLIP's and SigLIP's one `vision_model.` deeper;
- experts: Qwen3-MoE has three matrices an expert, Qwen3-VL-MoE the fused ones transposed.

What transformers 5 saves is a third form, mixed from both. Written without vlmcore's weight maps,
to be evidence about them.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

Tensors = dict[str, torch.Tensor]
Renames = tuple[tuple[str, str], ...]

TOWER_BESIDE: Renames = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.(multi_modal_projector\.|image_newline$|vision_tower\.)", r"\1"),
)
DEEPER_TOWER: Renames = (*TOWER_BESIDE, (r"^vision_tower\.", "vision_tower.vision_model."))
HUB_RENAMES: dict[str, Renames] = {
    "qwen2_5_vl": ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")),
    "internvl": TOWER_BESIDE,
    "llava": DEEPER_TOWER,
    "llava_onevision": DEEPER_TOWER,
}
FUSED = re.compile(r"(?P<experts>.+\.mlp\.experts)\.(?P<matrix>gate_up_proj|down_proj)")


def as_memory(folder: Path, target: Path) -> Path:
    """A copy of the model in `folder` in memory form."""
    return _write(_memory_tensors(folder), folder, target)


def as_hub(folder: Path, target: Path) -> Path:
    """A copy of the model in `folder` in hub form; its config stays as transformers 5 saved it."""
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    return _write(hub_tensors(_memory_tensors(folder), model_type), folder, target)


def hub_tensors(memory: Mapping[str, torch.Tensor], model_type: str) -> Tensors:
    """Tensors in hub form from those in memory form; works on the meta device."""
    transposed = model_type == "qwen3_vl_moe"
    result = {}
    for key, tensor in memory.items():
        for pattern, replacement in HUB_RENAMES.get(model_type, ()):
            key = re.sub(pattern, replacement, key)
        fused = FUSED.fullmatch(key)
        if fused is None:
            result[key] = tensor
        elif transposed:
            result[key] = tensor.transpose(1, 2)
        else:
            result.update(_by_expert(fused["experts"], fused["matrix"], tensor))
    return result


def untied(tensors: Mapping[str, torch.Tensor], *, tied: bool) -> Tensors:
    """Without the output layer where it is the embedding: a checkpoint holds it once."""
    return {
        key: tensor for key, tensor in tensors.items() if not (tied and key == "lm_head.weight")
    }


def _by_expert(
    experts: str, matrix: str, stacked: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    for number, expert in enumerate(stacked):
        if matrix == "down_proj":
            yield f"{experts}.{number}.down_proj.weight", expert
        else:
            gate, up = expert.chunk(2)
            yield f"{experts}.{number}.gate_proj.weight", gate
            yield f"{experts}.{number}.up_proj.weight", up


def _memory_tensors(folder: Path) -> Tensors:
    import transformers

    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    model = getattr(transformers, name).from_pretrained(folder, dtype="auto")
    return untied(model.state_dict(), tied=model.config.tie_word_embeddings)


def _write(tensors: Tensors, folder: Path, target: Path) -> Path:
    from safetensors.torch import save_file

    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(contiguous, target / "model.safetensors", metadata={"format": "pt"})
    return target
