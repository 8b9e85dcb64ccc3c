"""What headers and configs tell of a model, against the models that are built of them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from tests.tiny.models import BUILDERS
from vlmcore.dataloading.media import MediaLimits, MediaProcessor
from vlmcore.errors import DataError, WeightError
from vlmcore.families import FAMILIES
from vlmcore.surgery.swap import swap_llm
from vlmcore.training.freeze_groups import hollow_model
from vlmcore.training.launch import launch
from vlmcore.training.model_outline import outline, outline_of_swap

TinyModel = Callable[..., Path]


@pytest.mark.parametrize("model_type", BUILDERS)
def test_names_are_those_of_the_transformers_model(tiny_model: TinyModel, model_type: str) -> None:
    told = outline(tiny_model(model_type))
    model = hollow_model(tiny_model(model_type), told.family)
    weights = dict(model.named_parameters())
    assert {*told.dims} == {*weights}
    assert {*told.linear_layers} == {
        name for name, module in model.named_modules() if type(module) is nn.Linear
    }
    assert {*told.stacked_experts} == {
        name for name, weight in weights.items() if ".experts." in name and weight.ndim == 3
    }


@pytest.mark.slow
def test_megatron_names_are_those_of_the_megatron_model(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    folders = [tiny_model(model_type) for model_type in BUILDERS]
    folders.append(tiny_model("qwen2", tied=True))
    launch(
        "tests.training.naming_rank",
        [str(tmp_path / "names"), *map(str, folders)],
        nproc_per_node=1,
        log_path=tmp_path / "log",
    )
    built = json.loads((tmp_path / "names").read_text())
    for folder in folders:
        assert {*outline(folder).megatron_parameters()} == {*built[str(folder)]}, folder


def test_tied_embeddings_are_one_parameter(tiny_model: TinyModel) -> None:
    told = outline(tiny_model("qwen2", tied=True))
    assert "model.embed_tokens.weight" in told.dims
    assert "lm_head.weight" not in told.dims


@pytest.mark.parametrize(
    ("vlm", "llm", "shell"),
    [
        ("qwen3_vl", "qwen3", "auto"),
        ("qwen3_vl_moe", "qwen3_moe", "auto"),
        ("qwen2_5_vl", "qwen3", "exaone4_5"),
        ("llava", "qwen2", "auto"),
    ],
)
def test_a_swap_is_known_before_it_is_made(
    tiny_model: TinyModel, tmp_path: Path, vlm: str, llm: str, shell: str
) -> None:
    donors = tiny_model(vlm), tiny_model(llm, num_hidden_layers=4)
    foretold = outline_of_swap(*donors, shell=shell)
    swap_llm(*donors, tmp_path / "swap", seed=1, shell=shell)
    made = outline(tmp_path / "swap")
    assert foretold.dims == made.dims
    assert foretold.rows == made.rows
    assert foretold.num_deepstack == made.num_deepstack
    assert (foretold.decoder.num_layers, foretold.decoder.moe) == (4, made.decoder.moe)


def test_a_pair_that_no_shell_holds_is_refused_before_the_swap(tiny_model: TinyModel) -> None:
    with pytest.raises(WeightError, match="its decoder has no q, k and v biases"):
        outline_of_swap(tiny_model("qwen3_vl"), tiny_model("qwen2"), shell="auto")


@pytest.mark.parametrize("model_type", [name for name, f in FAMILIES.items() if f.vision])
def test_the_limits_that_a_family_names_are_those_that_its_processor_keeps(
    tiny_model: TinyModel, model_type: str
) -> None:
    folder, vision = tiny_model(model_type), FAMILIES[model_type].vision
    assert vision is not None
    for name in ("max_pixels", "min_pixels", "video_max_pixels"):
        limits = MediaLimits(**{name: 50_000})
        if name in vision.pixel_limits:
            MediaProcessor(folder, limits)
        else:
            with pytest.raises(DataError, match=f"{name} cannot be kept"):
                MediaProcessor(folder, limits)
