import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vlmcore.errors import WeightError
from vlmcore.families import FAMILIES
from vlmcore.models.vision import Placeholders, build_vision_model, placeholders, see

SHELLS = sorted(name for name, family in FAMILIES.items() if family.vision)


@pytest.fixture(params=SHELLS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def config_of(model_dir: Path):  # noqa: ANN201 - a class of transformers
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model_dir)


def test_the_vision_side_is_transformers_own_without_its_decoder(
    tiny_model: Callable[..., Path], name: str
) -> None:
    import transformers

    model_dir, family = tiny_model(name), FAMILIES[name]
    whole = getattr(transformers, family.architecture).from_pretrained(model_dir).model
    built = build_vision_model(config_of(model_dir), family, dtype=torch.float32)
    assert type(built) is type(whole)
    expected = {
        key: tensor
        for key, tensor in whole.state_dict().items()
        if not key.startswith("language_model.")
    }
    assert {key: t.shape for key, t in built.state_dict().items()} == {
        key: t.shape for key, t in expected.items()
    }


def test_what_no_checkpoint_holds_is_computed(tiny_model: Callable[..., Path], name: str) -> None:
    """In bf16 too, frequencies stay in the dtype that transformers keeps them in."""
    import transformers

    model_dir, family = tiny_model(name), FAMILIES[name]
    for dtype in (torch.float32, torch.bfloat16):
        cls = getattr(transformers, family.architecture)
        whole = cls.from_pretrained(model_dir, dtype=dtype).model
        built = build_vision_model(config_of(model_dir), family, dtype=dtype)
        found = dict(built.named_buffers())
        expected = {
            key: buffer
            for key, buffer in whole.named_buffers()
            if not key.startswith("language_model.")
        }
        assert found.keys() == expected.keys()
        for key, buffer in expected.items():
            assert found[key].dtype == buffer.dtype, key
            assert torch.equal(found[key], buffer), key
        assert {weight.dtype for weight in built.parameters()} == {dtype}


def test_features_are_as_many_as_placeholders(tiny_model: Callable[..., Path], name: str) -> None:
    from vlmcore.training.precision_samples import precision_samples

    model_dir, family = tiny_model(name), FAMILIES[name]
    config = config_of(model_dir)
    built = build_vision_model(config, family, dtype=torch.float32)
    tokens = placeholders(model_dir, family, config)
    for sample in precision_samples(model_dir):
        with torch.no_grad():
            seen = see(built, sample.vision_inputs, tokens, dtype=torch.float32)
        assert sum(len(features.embedded) for features in seen) == sample.is_placeholder.sum()
        for features in seen:
            assert (sample.input_ids == features.token_id).sum() == len(features.embedded)
            assert all(level.shape == features.embedded.shape for level in features.deepstack)
            assert len(features.deepstack) == (2 if name.startswith("qwen3_vl") else 0)


def test_token_ids_come_from_the_tokenizer_and_must_be_the_configs(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    family = FAMILIES["qwen3_vl"]
    copy = shutil.copytree(tiny_model("qwen3_vl"), tmp_path / "copy")
    found = placeholders(copy, family, config_of(copy))
    assert found == Placeholders(
        image=config_of(copy).image_token_id, video=config_of(copy).video_token_id
    )
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(
        json.dumps(config | {"image_token_id": 3, "video_token_id": 4})
    )
    with pytest.raises(WeightError) as refusal:
        placeholders(copy, family, config_of(copy))
    assert f"<|image_pad|> id {found.image}, config.json says image_token_id 3" in str(
        refusal.value
    )
    assert f"<|video_pad|> id {found.video}, config.json says video_token_id 4" in str(
        refusal.value
    )


def test_a_tokenizer_without_the_placeholder_is_refused(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(WeightError, match="the tokenizer has no token <IMG_CONTEXT>"):
        placeholders(tiny_model("qwen3"), FAMILIES["internvl"], config_of(tiny_model("internvl")))
