import pytest
from torch import nn

from vlmcore.errors import TrainError
from vlmcore.families import FAMILIES
from vlmcore.recipe.train_stage import TrainStage
from vlmcore.training.freeze_groups import require_match, require_trainable
from vlmcore.training.freezing import apply_freezes, freeze_group

STAGE = {"name": "s", "data": ("d",), "train_iters": 1}


def model_of(*layers: str) -> nn.Module:
    """A module tree with one Linear of 2 + 1 numbers at each dotted name."""
    root = nn.Module()
    for dotted in layers:
        *above, last = dotted.split(".")
        module = root
        for name in above:
            if not hasattr(module, name):
                module.add_module(name, nn.Module())
            module = module.get_submodule(name)
        module.add_module(last, nn.Linear(2, 1))
    return root


@pytest.mark.parametrize(
    ("parameter", "group"),
    [
        ("vision_model.visual.blocks.0.attn.qkv.weight", "vit"),
        ("vision_model.visual.pos_embed.weight", "vit"),
        ("vision_model.visual.merger.norm.weight", "aligner"),
        ("vision_model.visual.deepstack_merger_list.1.linear_fc2.bias", "aligner"),
        ("language_model.decoder.layers.0.mlp.linear_fc1.weight", "llm"),
        ("language_model.output_layer.weight", "llm"),
    ],
)
def test_parameters_of_the_megatron_model_are_grouped(parameter: str, group: str) -> None:
    assert freeze_group(parameter, FAMILIES["qwen3_vl"]) == group


def trained(model: nn.Module, stage: TrainStage) -> set[str]:
    apply_freezes(model, FAMILIES["qwen3_vl"], stage)
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def test_only_unfrozen_groups_train() -> None:
    model = model_of(
        "vision_model.visual.patch_embed.proj", "vision_model.visual.merger.linear_fc1", "decoder.a"
    )
    stage = TrainStage(**STAGE, freeze_vit=True, freeze_llm=True)
    merger = "vision_model.visual.merger.linear_fc1"
    assert trained(model, stage) == {f"{merger}.weight", f"{merger}.bias"}


def test_a_regex_trains_more_than_the_groups() -> None:
    model = model_of("vision_model.visual.merger.linear_fc1", "decoder.a", "decoder.b")
    frozen = {f"freeze_{group}": True for group in ("vit", "aligner", "llm")}
    stage = TrainStage(**STAGE, **frozen, trainable_parameters_regex=r"decoder\.b\.w|fc1\.bias")
    expected = {"vision_model.visual.merger.linear_fc1.bias", "decoder.b.weight"}
    assert trained(model, stage) == expected


def test_nothing_trainable_is_refused() -> None:
    """The recipe cannot see that a `vlm` is a text model, so the model itself decides."""
    stage = TrainStage(**STAGE, freeze_llm=True)
    with pytest.raises(TrainError, match="train.s: nothing is trainable: the model has llm"):
        require_trainable({"llm": {"parameters": 3, "trainable": 0}}, stage)


def test_a_regex_that_matches_nothing_is_refused_with_names_like_it() -> None:
    names = ["decoder.layers.0.linear_qkv.weight", "decoder.layers.0.linear_proj.weight"]
    require_match(names, TrainStage(**STAGE, trainable_parameters_regex=r"\.0\..*qkv"))
    slip = TrainStage(**STAGE, trainable_parameters_regex="linear_qvk")
    with pytest.raises(
        TrainError, match=r"'linear_qvk' matches no parameter; engine megatron.*qkv"
    ):
        require_match(names, slip)
