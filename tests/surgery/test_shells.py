import typing
from collections.abc import Callable
from pathlib import Path

import pytest

from vlmcore.errors import WeightError
from vlmcore.families import FAMILIES
from vlmcore.recipe.schema import Model
from vlmcore.surgery.shells import ANY, AUTO, NOT_EXACT, SHELLS, choose_shell
from vlmcore.surgery.swap import swap_llm

TEXT_FAMILIES = {name for name, family in FAMILIES.items() if family.vision is None}
VISION_FAMILIES = set(FAMILIES) - TEXT_FAMILIES


def test_the_table_covers_every_family_and_a_recipe_can_name_each_shell() -> None:
    assert set(ANY) == TEXT_FAMILIES
    assert set(SHELLS) == VISION_FAMILIES
    assert {vlm for shell in SHELLS.values() for vlm in shell.vlms} == VISION_FAMILIES
    named = typing.get_args(Model.model_fields["shell"].annotation)
    assert set(named) == {AUTO, *SHELLS}


@pytest.mark.parametrize("shell", sorted(SHELLS))
@pytest.mark.parametrize("llm", sorted(TEXT_FAMILIES))
def test_a_shell_holds_an_llm_or_says_why_not(shell: str, llm: str) -> None:
    assert (llm in SHELLS[shell].llms) != ((shell, llm) in NOT_EXACT)


@pytest.mark.parametrize(
    ("vlm", "llm", "asked", "chosen"),
    [
        ("qwen3_vl", "qwen3", AUTO, "qwen3_vl"),
        ("qwen3_vl_moe", "qwen3", AUTO, "qwen3_vl"),
        ("qwen3_vl", "qwen3_moe", AUTO, "qwen3_vl_moe"),
        ("qwen2_5_vl", "qwen2", AUTO, "qwen2_5_vl"),
        ("qwen2_5_vl", "qwen2", "exaone4_5", "exaone4_5"),
        ("qwen2_5_vl", "qwen3", "exaone4_5", "exaone4_5"),
        ("exaone4_5", "qwen3", AUTO, "exaone4_5"),
        ("internvl", "qwen3_moe", AUTO, "internvl"),
        ("llava", "llama", AUTO, "llava"),
        ("llava_onevision", "qwen2", "llava_onevision", "llava_onevision"),
    ],
)
def test_the_shell_follows_the_donors(vlm: str, llm: str, asked: str, chosen: str) -> None:
    assert choose_shell(FAMILIES[vlm], FAMILIES[llm], asked).model_type == chosen


@pytest.mark.parametrize(
    ("vlm", "llm", "asked", "said"),
    [
        ("qwen2_5_vl", "qwen3", AUTO, ["no q_norm and k_norm", "21 to 54 %",
                                       "vlmflow swap --vlm A --llm B --out C --shell exaone4_5",
                                       "model.shell: exaone4_5",
                                       "another vision donor: exaone4_5, internvl, llava, "
                                       "llava_onevision, qwen3_vl, qwen3_vl_moe"]),
        ("qwen2_5_vl", "llama", AUTO, ["biases would have no source", "--shell exaone4_5"]),
        ("qwen2_5_vl", "qwen3", "qwen2_5_vl", ["no q_norm and k_norm", "--shell exaone4_5"]),
        ("qwen3_vl", "llama", AUTO, ["q_norm and k_norm would have no source",
                                     "this vision donor with another LLM: qwen3, qwen3_moe"]),
        ("qwen3_vl", "qwen3_moe", "qwen3_vl", ["no experts", "leave --shell"]),
        ("qwen3_vl", "qwen3", "exaone4_5", ["Exaone4_5_ForConditionalGeneration has another vision "
                                            "tower than qwen3_vl"]),
        ("qwen2_5_vl", "qwen3", "qwen3_vl", ["has another vision tower than qwen2_5_vl"]),
        ("qwen3", "qwen3", AUTO, ["model.vlm is a qwen3, which has no vision tower"]),
        ("qwen3_vl", "qwen3_vl", AUTO, ["model.llm is a qwen3_vl; expected a text-only model"]),
        ("qwen3_vl", "qwen3", "gemma3", ["no shell is named 'gemma3'; there are exaone4_5"]),
    ],
)  # fmt: skip
def test_a_pair_that_no_class_holds_is_refused_with_what_to_do(
    vlm: str, llm: str, asked: str, said: list[str]
) -> None:
    with pytest.raises(WeightError) as refusal:
        choose_shell(FAMILIES[vlm], FAMILIES[llm], asked)
    assert [words for words in said if words not in str(refusal.value)] == []


def test_a_refused_pair_leaves_nothing_behind(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(WeightError, match="qwen3 into qwen2_5_vl"):
        swap_llm(tiny_model("qwen2_5_vl"), tiny_model("qwen3"), tmp_path / "swapped", seed=0)
    assert not (tmp_path / "swapped").exists()
