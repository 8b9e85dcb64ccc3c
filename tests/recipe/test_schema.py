import subprocess
import sys

import pytest
from pydantic import ValidationError

from vlmcore.recipe import load_recipe
from vlmcore.recipe.schema import CrossFieldError, Evaluate, Recipe, Section, TrainStage
from vlmcore.recipe.spellings import OTHERWISE, SAME, VALUES

MODELS = {model.__name__: model for model in Section.__subclasses__()}
FIELDS = [
    pytest.param(info, id=f"{model}.{name}")
    for model, fields in MODELS.items()
    for name, info in fields.model_fields.items()
]
HEAVY = ("torch", "prefect", "transformers", "megatron", "numpy")


@pytest.mark.parametrize("info", FIELDS)
def test_every_field_has_a_description(info) -> None:
    assert info.description


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_schema_for_forms_describes_every_property(model) -> None:
    properties = model.model_json_schema()["properties"]
    assert properties.keys() == model.model_fields.keys()
    assert all("description" in value for value in properties.values())


def test_importing_the_recipe_loads_nothing_heavy() -> None:
    code = f"import sys, vlmcore.recipe; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_recipe_does_not_change_after_loading(write) -> None:
    recipe = load_recipe(write())
    with pytest.raises(ValidationError, match="frozen"):
        recipe.train[0].seed = 3


def test_how_a_stage_runs_is_no_part_of_what_it_produces(write) -> None:
    one = load_recipe(write()).train[0]
    other = load_recipe("recipe.yaml", ["train.align.log_interval=3", "train.align.num_threads=2"])
    changed = load_recipe("recipe.yaml", ["train.align.learning_rate=2e-3"])
    assert one != other.train[0]
    assert one.content_params() == other.train[0].content_params()
    assert one.content_params() != changed.train[0].content_params()
    assert "save_interval" not in one.content_params()


def test_a_benchmark_scores_the_listed_checkpoints_else_the_last(write) -> None:
    recipe = load_recipe(write())
    assert recipe.checkpoints == ("swap", "align", "full")
    assert recipe.scored_checkpoints(recipe.evaluate[0]) == ("align", "full")
    assert recipe.scored_checkpoints(Evaluate(benchmark="x", data="numbers")) == ("full",)


def test_the_llms_own_stage_is_no_checkpoint_to_score(write) -> None:
    text = "train: [{name: words, model: llm, data: [numbers], train_iters: 1}]"
    overrides = [text.replace(": ", "=", 1), "evaluate=[]", "gates=[]"]
    recipe = load_recipe(write(), overrides)
    assert recipe.checkpoints == ("swap",)
    assert recipe.scored_checkpoints(Evaluate(benchmark="x", data="numbers")) == ("swap",)


def test_a_stage_reports_all_its_faults_each_at_its_field() -> None:
    with pytest.raises(ValidationError) as caught:
        TrainStage(
            name="x",
            data=("d",),
            train_iters=1,
            min_lr=1,
            micro_batch_size=2,
            freeze_vit=True,
            freeze_aligner=True,
            freeze_llm=True,
        )
    (error,) = caught.value.errors()
    cause = error["ctx"]["error"]
    assert isinstance(cause, CrossFieldError)
    paths = {path for path, _ in cause.faults}
    fields = ("freeze_llm", "min_lr", "global_batch_size", "micro_batch_size")
    assert paths == {(field,) for field in fields}
    assert "min_lr: 1.0 is above learning_rate 1e-05" in str(cause)


def test_ranks_that_read_different_data_are_those_beside_tensor_parallel() -> None:
    stage = TrainStage(
        name="x",
        data=("d",),
        train_iters=1,
        nproc_per_node=6,
        tensor_model_parallel_size=2,
        global_batch_size=3,
    )
    assert stage.data_parallel_size == 3


def test_other_tools_names_lead_to_fields_that_exist() -> None:
    fields = {name for model in MODELS.values() for name in model.model_fields}
    targets = {name for names in SAME.values() for name in names} | {
        name for name, _ in OTHERWISE.values()
    }
    assert targets <= fields
    assert not SAME.keys() & OTHERWISE.keys()
    schema = str(Recipe.model_json_schema())
    assert [value for value in VALUES.values() if f"'{value}'" not in schema] == []
