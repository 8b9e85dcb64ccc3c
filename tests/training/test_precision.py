import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vlmcore.errors import TrainError
from vlmcore.families import FAMILIES
from vlmcore.layout import Layout
from vlmcore.training.launch import run_precision_test
from vlmcore.training.precision_samples import Sample, precision_samples
from vlmcore.weights.convert import to_mcore

WITH_MROPE = sorted(name for name, f in FAMILIES.items() if f.vision and f.vision.mrope)
ANSWER = "An answer of a few tokens: 0123456789."


def rope_index_of_transformers(model_dir: Path, sample: Sample) -> torch.Tensor:
    """[3, 1, S] by the method of transformers' model, without building its modules."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(model_dir)
    name = FAMILIES[config.model_type].architecture.removesuffix("ForConditionalGeneration")
    cls: Any = getattr(transformers, f"{name}Model")
    model = SimpleNamespace(config=config)
    model.get_vision_position_ids = cls.get_vision_position_ids.__get__(model)
    types = sample.inputs["mm_token_type_ids"]
    names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    grids = {key: sample.inputs[key] for key in names if key in sample.inputs}
    positions: torch.Tensor = cls.get_rope_index(model, sample.input_ids, types, **grids)[0]
    return positions


@pytest.mark.parametrize("name", WITH_MROPE)
def test_positions_equal_transformers_own(tiny_model: Callable[..., Path], name: str) -> None:
    samples = precision_samples(tiny_model(name))
    assert {"several images", "video"} <= {sample.name for sample in samples}
    for sample in samples[1:]:  # transformers wants an image or a video
        expected = rope_index_of_transformers(tiny_model(name), sample)
        assert torch.equal(sample.position_ids, expected), sample.name


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_sample_is_a_question_and_its_answer(tiny_model: Callable[..., Path], name: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model(name))
    samples = precision_samples(tiny_model(name))
    assert samples[0].name == "text"
    assert not samples[0].vision_inputs
    assert not samples[0].is_placeholder.any()
    for sample in samples:
        answer = tokenizer.decode(sample.input_ids[0, sample.num_prompt_tokens :])
        assert answer.startswith(ANSWER)
        assert sample.position_ids.shape == (3, *sample.input_ids.shape)
        assert not sample.is_placeholder[sample.num_prompt_tokens :].any()
    for sample in samples[1:]:
        assert {"pixel_values", "pixel_values_videos"} & {*sample.vision_inputs}
        assert not {"input_ids", "attention_mask", "mm_token_type_ids"} & {*sample.vision_inputs}
        assert sample.is_placeholder.any()


def test_a_base_model_without_a_chat_template_is_asked_in_plain_text(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    import shutil

    from transformers import AutoTokenizer

    copy = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    for path in copy.glob("chat_template*"):
        path.unlink()
    assert AutoTokenizer.from_pretrained(copy).chat_template is None
    (sample,) = precision_samples(copy)
    assert 0 < sample.num_prompt_tokens < sample.input_ids.shape[1]


@pytest.mark.slow
def test_rows_are_what_the_file_holds(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    to_mcore(tiny_model("qwen3_vl"), tmp_path / "mcore")
    layouts = [Layout(), Layout(tensor_model_parallel_size=2, sequence_parallel=True)]
    rows = run_precision_test(
        tiny_model("qwen3_vl"),
        tmp_path / "mcore",
        layouts=layouts,
        tolerance=1e-5,
        log_path=tmp_path / "log",
        out=tmp_path / "rows.json",
    )
    assert rows == json.loads((tmp_path / "rows.json").read_text())
    assert [row["layout"] for row in rows] == ["one rank"] * 5 + ["tp2-sp"] * 5
    assert [row["tensor_model_parallel_size"] for row in rows] == [1] * 5 + [2] * 5
    assert all(row["passed"] and row["diverges_at"] is None for row in rows)


@pytest.mark.slow
def test_a_layout_that_does_not_divide_the_model_is_the_users_error(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    to_mcore(tiny_model("qwen3"), tmp_path / "mcore")
    with pytest.raises(TrainError, match=r"layout vpp2: .*needs pipeline_model_parallel_size"):
        run_precision_test(
            tiny_model("qwen3"),
            tmp_path / "mcore",
            layouts=[Layout(virtual_pipeline_model_parallel_size=2)],
            tolerance=1e-5,
            log_path=tmp_path / "log",
            out=tmp_path / "rows.json",
        )
