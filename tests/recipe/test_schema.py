import subprocess
import sys

import pytest
from pydantic import ValidationError

from vlmcore.recipe import load_recipe
from vlmcore.recipe.schema import Evaluate, Recipe
from vlmcore.recipe.section import CrossFieldError, Section
from vlmcore.recipe.spellings import OTHERWISE, SAME, VALUES
from vlmcore.recipe.train_stage import TrainStage

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


STAGE = {"name": "x", "data": ("d",), "train_iters": 1}


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"pipeline_model_parallel_size": 3}, "nproc_per_node", "context parallel size = 3"),
        ({"expert_model_parallel_size": 8}, "nproc_per_node", "takes 8 ranks"),
        ({"virtual_pipeline_model_parallel_size": 2},
         "virtual_pipeline_model_parallel_size", "needs pipeline_model_parallel_size"),
        ({"virtual_pipeline_model_parallel_size": 2, "pipeline_model_parallel_size": 2,
          "global_batch_size": 6}, "global_batch_size", "makes 3 micro batches"),
        ({"lr_decay_style": "WSD"}, "lr_wsd_decay_iters", "empty, but WSD"),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 2}, "lr_wsd_decay_iters",
         "2 is more than train_iters 1"),
        ({"trainable_parameters_regex": "qkv("}, "trainable_parameters_regex",
         "no regular expression: missing )"),
        ({"lr_warmup_iters": 3, "lr_warmup_fraction": 0.1}, "lr_warmup_iters", "leave one"),
        ({"lora_rank": 4}, "lora_rank", "needs tuner_type lora"),
        ({"tuner_type": "lora", "freeze_llm": True}, "freeze_llm", "adapters belong to"),
        ({"tuner_type": "lora_llm", "freeze_vit": True, "freeze_aligner": True},
         "tuner_type", "use lora"),
        ({"recompute_modules": ["mlp"]}, "recompute_modules", "only for recompute_granularity"),
        ({"vit_lr": 1e-3, "freeze_vit": True}, "vit_lr", "freeze_vit is true"),
        ({"overlap_param_gather": True}, "overlap_param_gather", "needs overlap_grad_reduce"),
        ({"hysteresis": 1}, "hysteresis", "only for torch_dtype float16"),
        ({"torch_dtype": "float16", "initial_loss_scale": 2.0, "min_loss_scale": 4.0},
         "min_loss_scale", "4 is above initial_loss_scale"),
        ({"optimizer_offload_fraction": 0.5}, "optimizer_offload_fraction",
         "only with optimizer_cpu_offload"),
        ({"optimizer_cpu_offload": True, "torch_dtype": "float16"}, "optimizer_cpu_offload",
         "needs torch_dtype bfloat16, found float16"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end", "needs eval_interval"),
        ({"max_encoded_bytes": 9}, "max_encoded_bytes", "only with cache_encoded_samples"),
        ({"master_addr": "first"}, "master_addr", "only for nnodes above 1"),
        ({"nnodes": 3, "tensor_model_parallel_size": 8}, "tensor_model_parallel_size",
         "8 does not divide nnodes × nproc_per_node = 12"),
    ],
)  # fmt: skip
def test_a_stage_that_cannot_be_trained_so_is_refused(
    fields: dict[str, object], field: str, words: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        TrainStage(**(STAGE | {"nproc_per_node": 4, "global_batch_size": 4} | fields))
    (error,) = caught.value.errors()
    cause = error["ctx"]["error"]
    assert isinstance(cause, CrossFieldError)
    (fault,) = cause.faults
    assert fault[0] == (field,)
    assert words in fault[1]


def test_rows_are_padded_so_that_every_rank_holds_an_equal_part() -> None:
    sizes = {"tensor_model_parallel_size": 2, "context_parallel_size": 3, "nproc_per_node": 6}
    assert TrainStage(**STAGE, **sizes).row_multiple == 6
    assert TrainStage(**STAGE, **sizes, sequence_parallel=True).row_multiple == 12
    assert TrainStage(**STAGE).row_multiple == 1


def test_other_tools_names_lead_to_fields_that_exist() -> None:
    fields = {name for model in MODELS.values() for name in model.model_fields}
    targets = {name for names in SAME.values() for name in names} | {
        name for name, _ in OTHERWISE.values()
    }
    assert targets <= fields
    assert not SAME.keys() & OTHERWISE.keys()
    schema = str(Recipe.model_json_schema())
    assert [value for value in VALUES.values() if f"'{value}'" not in schema] == []
