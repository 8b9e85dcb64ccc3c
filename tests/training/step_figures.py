"""Steps of either engine beside transformers: how cases run, and what their figures have to be."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlmcore.training.launch import launch

# name: model, what all its layouts share, layouts; `killed_at`: a checkpoint after the first step
# was written at that layout
Cases = dict[str, tuple[str, dict[str, Any], dict[str, dict[str, Any]]]]

TWO = {"train_iters": 2}
LORA = TWO | {"tuner_type": "lora", "lora_rank": 4, "lora_alpha": 6}
EVERYWHERE = LORA | {"target_modules": ["all-linear"], "use_rslora": True}
LORA_LLM = LORA | {"tuner_type": "lora_llm", "freeze_vit": True}


def names_of(cases: Cases) -> list[str]:
    return [f"{case} {layout}" for case, (_, _, layouts) in cases.items() for layout in layouts]


def figures_of(
    cases: Cases, module: str, tiny_model: Callable[..., Path], folder: Path, *, ranks: int
) -> Any:
    """Figures of every case and layout, from one torchrun of a module."""
    told = [
        {
            "name": name,
            "hf": str(tiny_model(model, num_hidden_layers=4, tied=model == "qwen3")),
            "killed_at": fields.get("killed_at"),
            "fields": {key: value for key, value in fields.items() if key != "killed_at"},
            "layouts": layouts,
        }
        for name, (model, fields, layouts) in cases.items()
    ]
    (folder / "cases.json").write_text(json.dumps(told))
    launch(
        module,
        [str(folder / "cases.json"), str(folder / "out.json")],
        nproc_per_node=ranks,
        log_path=folder / "log",
    )
    return json.loads((folder / "out.json").read_text())


def require_step(figures: dict[str, Any]) -> None:
    """The reference's loss, gradient norm and weights, with clipping at work."""
    assert figures["clipped"]
    assert figures["loss"] <= 1e-5
    assert figures["evaluated"] <= 1e-6  # the loss before the update, without one
    assert figures["grad_norm"] <= 1e-5
    assert figures["worst"][1] <= 1e-5, figures["worst"]


def require_only_the_aligner_moved(moved: list[str]) -> None:
    assert len(moved) == 18  # three mergers of two linears and a norm, each weight and bias
    assert all("merger" in key for key in moved)


def require_adapted_layers_and_the_aligner_moved(moved: list[str]) -> None:
    whole = [key for key in moved if "lora_" not in key]
    layers = [key for key in whole if "language_model" in key]
    assert len(layers) == 4 * 7  # in each layer the four of attention and the three of the mlp
    assert all(key.endswith("_proj.weight") for key in layers)
    require_only_the_aligner_moved([key for key in whole if key not in layers])
