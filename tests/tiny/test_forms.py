"""Evidence that the tiny models' key forms are what transformers takes them for."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny.forms import as_hub, as_memory
from tests.tiny.models import BUILDERS

MODELS = [(name, {"tied": tied}) for name in BUILDERS for tied in (False, True)]
MODELS += [(name, {"text_type": "qwen3_moe"}) for name in ("internvl", "exaone4_5", "llava")]


@pytest.mark.parametrize("form", [as_hub, as_memory])
@pytest.mark.parametrize(("name", "options"), MODELS)
def test_transformers_loads_every_form_to_the_same_bits(
    name: str,
    options: dict[str, object],
    form: Callable[[Path, Path], Path],
    tiny_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    saved = tiny_model(name, **options)
    expected, fresh = _load(saved)
    found, loaded = _load(form(saved, tmp_path / "other"))
    assert fresh == loaded == {"missing_keys": set(), "unexpected_keys": set()}
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_hub_form_has_the_published_prefixes(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    keys = {
        "qwen2_5_vl": {"model.layers.0.mlp.up_proj.weight", "visual.merger.ln_q.weight"},
        "internvl": {"language_model.lm_head.weight", "vision_tower.embeddings.cls_token"},
        "llava": {"vision_tower.vision_model.embeddings.class_embedding"},
        "llava_onevision": {"image_newline", "language_model.model.norm.weight"},
        "qwen3_moe": {"model.layers.2.mlp.experts.3.gate_proj.weight"},
    }
    for name, some in keys.items():
        folder = as_hub(tiny_model(name), tmp_path / name)
        assert some <= set(load_file(folder / "model.safetensors"))


def _load(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, set[str]]]:
    import transformers

    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    model, info = getattr(transformers, architecture).from_pretrained(
        folder, output_loading_info=True
    )
    return model.state_dict(), {key: set(info[key]) for key in ("missing_keys", "unexpected_keys")}
