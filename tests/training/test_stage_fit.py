"""What a stage asks for that its model or its machine does not have, told without torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlmcore.recipe.train_stage import TrainStage
from vlmcore.training.model_outline import outline
from vlmcore.training.stage_fit import fit_faults, machine_faults

TinyModel = Callable[..., Path]
EXPERTS = "experts beside tensor parallel layers train with sequence_parallel alone"


def stage(**fields: Any) -> TrainStage:
    ranks = {"nproc_per_node": 12, "global_batch_size": 12}
    return TrainStage(**({"name": "s", "data": ("d",), "train_iters": 1} | ranks | fields))


def lora(*targets: str, **fields: Any) -> dict[str, Any]:
    return {"tuner_type": "lora", "target_modules": targets} | fields


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("qwen3_vl", {"tensor_model_parallel_size": 2}),
        ("qwen3_vl", {"tensor_model_parallel_size": 4}),  # two ranks share a kv head
        ("qwen3_vl", lora("q_proj", "merger.linear_fc1", "blocks.0.attn.qkv")),
        ("qwen3_vl", lora("all-linear", freeze_llm=True)),
        ("qwen3_moe", lora("gate_up_proj", tensor_model_parallel_size=1)),
        ("qwen3_moe", {"trainable_parameters_regex": r"local_experts\.3\.linear_fc2",
                       "freeze_llm": True}),
        ("qwen3_vl", {"trainable_parameters_regex": r"layers\.2\.input_layernorm",
                      "freeze_llm": True}),
        ("qwen3_vl", {"trainable_parameters_regex": r"layers\.2\.mlp\.up_proj",
                      "freeze_llm": True, "engine": "transformers"}),
        ("qwen2_5_vl", {"max_pixels": 10_000, "video_max_pixels": 9_000, "vit_lr": 0.1}),
        ("internvl", {"max_pixels": 10_000}),
        ("qwen3", {"freeze_vit": True, "freeze_aligner": True}),
        ("qwen3_moe", {"engine": "transformers"} | lora("q_proj", tuner_type="dora")),
        ("qwen3_moe", {"torch_dtype": "float16"}),
    ],
)  # fmt: skip
def test_a_stage_that_fits_has_no_faults(
    tiny_model: TinyModel, model_type: str, fields: dict[str, Any]
) -> None:
    assert fit_faults(stage(**fields), outline(tiny_model(model_type))) == []


@pytest.mark.parametrize(
    ("model_type", "fields", "words"),
    [
        ("qwen3", {"tensor_model_parallel_size": 3}, "3 does not divide num_attention_heads 4"),
        ("qwen3", {"pipeline_model_parallel_size": 2}, "2 does not divide num_hidden_layers 3"),
        ("qwen3", {"expert_model_parallel_size": 2}, "need a language model with experts"),
        ("qwen3_moe", {"expert_model_parallel_size": 3}, "3 does not divide num_experts 4"),
        ("qwen3_moe", {"tensor_model_parallel_size": 2}, EXPERTS),
        ("qwen3_vl", {"pipeline_model_parallel_size": 3}, "the first 2 decoder layers (deepstack)"),
        ("qwen3_vl", lora("q_proj", "qproj", "k_projs"), "target_modules: qproj, k_projs: no"),
        ("qwen3_vl", lora("embed_tokens"), "target_modules: embed_tokens: no linear layer"),
        ("qwen3_vl", lora("attn.qkv", freeze_vit=True), "target_modules: attn.qkv: no linear"),
        ("qwen3_moe", lora("gate_proj"), "there are: down_proj, gate_up_proj, k_proj"),
        ("qwen3", lora("all-linear", freeze_llm=True), "no linear layer in an unfrozen group"),
        ("qwen3", lora("k_proj", tensor_model_parallel_size=4), "cuts inside the 2 kv heads"),
        ("qwen3_moe", {"engine": "transformers"} | lora(tuner_type="dora"),
         "peft has no DoRA for stacked experts (mlp.experts.down_proj, "
         "mlp.experts.gate_up_proj)"),
        ("qwen3_vl", {"trainable_parameters_regex": "linear_qvk"},
         "engine megatron calls them such as language_model.decoder.layers."),
        ("qwen3_vl", {"trainable_parameters_regex": "linear_qkv", "engine": "transformers"},
         "engine transformers calls them such as model."),
        ("qwen3", {"freeze_llm": True}, "nothing is trainable: the model has llm"),
        ("qwen3", {"vit_lr": 0.1}, "vit_lr has no part in a qwen3, which has no vision side"),
        ("qwen3", {"max_pixels": 9}, "max_pixels has no part in a qwen3"),
        ("llava", {"max_pixels": 9}, "processor of a llava, which keeps none; leave it out"),
        ("internvl", {"video_max_pixels": 9}, "which keeps max_pixels, min_pixels; leave it out"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(
    tiny_model: TinyModel, model_type: str, fields: dict[str, Any], words: str
) -> None:
    (fault,) = fit_faults(stage(**fields), outline(tiny_model(model_type)))
    assert fault.startswith("train.s: ")
    assert words in fault


def test_all_faults_of_a_stage_are_told(tiny_model: TinyModel) -> None:
    fields = lora("qproj", tensor_model_parallel_size=3, video_max_pixels=9)
    faults = fit_faults(stage(**fields), outline(tiny_model("llava")))
    assert [fault.split(":")[1].split()[0] for fault in faults] == [
        "layout", "video_max_pixels", "target_modules",
    ]  # fmt: skip


def test_a_chat_needs_a_template(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_model("qwen3").iterdir():
        if path.name != "chat_template.jinja":
            (folder / path.name).symlink_to(path)
    (fault,) = fit_faults(stage(), outline(folder))
    assert fault == (
        f"train.s: {folder} has no chat template; add chat_template.jinja, or use task pt"
    )
    assert fit_faults(stage(task="pt"), outline(folder)) == []


QLORA = {"engine": "transformers", "tuner_type": "qlora"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [(QLORA, "qlora needs a GPU's driver"),
     ({"optimizer_cpu_offload": True}, "no GPU's driver, so nothing would move; leave it out")],
    ids=["qlora", "offload"],
)  # fmt: skip
def test_a_gpu_is_missed_where_this_machine_alone_trains(
    tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    (fault,) = machine_faults(stage(**fields), tmp_path)
    assert words in fault
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidiactl").touch()
    assert not any("driver" in fault for fault in machine_faults(stage(**fields), tmp_path))
    assert machine_faults(stage(**fields, nnodes=2, global_batch_size=24), tmp_path) == []
    assert machine_faults(stage(), tmp_path) == []
