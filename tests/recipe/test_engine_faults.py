import pytest
from pydantic import ValidationError

from vlmcore.recipe.section import CrossFieldError
from vlmcore.recipe.train_stage import TrainStage

STAGE = {
    "name": "x", "data": ("d",), "train_iters": 1, "nproc_per_node": 4, "global_batch_size": 4,
}  # fmt: skip
ZERO3 = {"engine": "transformers", "deepspeed": "zero3"}


def faults(**fields: object) -> dict[str, str]:
    with pytest.raises(ValidationError) as caught:
        TrainStage(**(STAGE | fields))
    (error,) = caught.value.errors()
    cause = error["ctx"]["error"]
    assert isinstance(cause, CrossFieldError)
    return {str(field): text for (field,), text in cause.faults}


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"deepspeed": "zero2"}, "deepspeed", "no part in engine megatron"),
        ({"fsdp": "fsdp2"}, "fsdp", "no part in engine megatron"),
        ({"tuner_type": "dora"}, "tuner_type", "dora needs engine transformers; use lora"),
        ({"tuner_type": "qlora"}, "tuner_type", "qlora needs engine transformers; use lora"),
        ({"tensor_model_parallel_size": 2, "engine": "transformers"},
         "tensor_model_parallel_size", "no part in engine transformers; leave it out"),
        ({"overlap_grad_reduce": True, "engine": "transformers"},
         "overlap_grad_reduce", "no part in engine transformers"),
        ({"torch_dtype": "float16", "engine": "transformers"}, "torch_dtype", "use bfloat16"),
        ({"recompute_granularity": "selective", "engine": "transformers"},
         "recompute_granularity", "use full"),
        ({"optimizer_cpu_offload": True, "engine": "transformers"},
         "optimizer_cpu_offload", "write deepspeed: zero2_offload"),
        (ZERO3 | {"fsdp": "fsdp2"}, "fsdp", "leave one of them out"),
        (ZERO3 | {"tuner_type": "qlora"}, "deepspeed", "cannot cut the 4-bit weights"),
        (ZERO3 | {"tuner_type": "lora", "vit_gradient_checkpointing": True},
         "vit_gradient_checkpointing", "use fsdp"),
        (ZERO3 | {"moe_aux_loss_coeff": 0.01, "recompute_granularity": "full"},
         "moe_aux_loss_coeff", "use fsdp"),
    ],
)  # fmt: skip
def test_what_an_engine_cannot_do_is_refused(
    fields: dict[str, object], field: str, words: str
) -> None:
    found = faults(**fields)
    assert found.keys() == {field}
    assert words in found[field]


def test_every_field_that_has_no_part_in_an_engine_is_named_at_once() -> None:
    found = faults(
        engine="transformers", tensor_model_parallel_size=2, sequence_parallel=True,
        context_parallel_size=2,
    )  # fmt: skip
    assert found.keys() == {
        "tensor_model_parallel_size", "sequence_parallel", "context_parallel_size",
    }  # fmt: skip


@pytest.mark.parametrize("tuner", ["full", "lora", "lora_llm", "dora", "qlora"])
def test_the_engine_is_the_only_word_that_changes(tuner: str) -> None:
    fields = {"tuner_type": tuner, "freeze_vit": True, "recompute_granularity": "full"}
    assert TrainStage(**STAGE, **fields, engine="transformers").data_parallel_size == 4
    if tuner in ("full", "lora", "lora_llm"):
        assert TrainStage(**STAGE, **fields).data_parallel_size == 4
