from dataclasses import replace
from typing import Any

import pytest

from vlmcore.errors import TrainError
from vlmcore.families import FAMILIES, LanguageModel, MixtureOfExperts
from vlmcore.layout import Layout, ranks_for
from vlmcore.models.fit import check_layout
from vlmcore.models.language_model import padded_vocab_size, transformer_config


@pytest.fixture
def model() -> LanguageModel:
    config = {
        "model_type": "qwen3",
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 30,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "max_position_embeddings": 64,
    }
    return FAMILIES["qwen3"].language_model(config)


EXPERTS = MixtureOfExperts(num_experts=6, top_k=2, ffn_hidden_size=20, norm_topk_prob=True)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"tensor_model_parallel_size": 4},
        {"tensor_model_parallel_size": 8},  # two ranks share a kv head
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    ],
)
def test_a_layout_that_divides_what_it_cuts_is_taken(
    model: LanguageModel, sizes: dict[str, int]
) -> None:
    check_layout(model, Layout(**sizes), num_deepstack=1)


def test_experts_are_cut_by_their_own_sizes(model: LanguageModel) -> None:
    sizes = {"expert_model_parallel_size": 3, "expert_tensor_parallel_size": 5}
    check_layout(replace(model, moe=EXPERTS, ffn_hidden_size=1), Layout(**sizes))


@pytest.mark.parametrize(
    ("sizes", "fields", "named"),
    [
        ({"tensor_model_parallel_size": 3}, {},
         "tensor_model_parallel_size 3 does not divide num_attention_heads 8"),
        ({"tensor_model_parallel_size": 4}, {"num_query_groups": 6},
         "tensor_model_parallel_size 4 does not divide num_key_value_heads 6"),
        ({"tensor_model_parallel_size": 4}, {"num_query_groups": 3},
         "tensor_model_parallel_size 4 is no multiple of num_key_value_heads 3"),
        ({"tensor_model_parallel_size": 4}, {"ffn_hidden_size": 90},
         "tensor_model_parallel_size 4 does not divide intermediate_size 90"),
        ({"pipeline_model_parallel_size": 3}, {},
         "pipeline_model_parallel_size 3 does not divide num_hidden_layers 4"),
        ({"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 4}, {},
         "virtual_pipeline_model_parallel_size 8 does not divide num_hidden_layers 4"),
        ({"virtual_pipeline_model_parallel_size": 2}, {},
         "needs pipeline_model_parallel_size above 1"),
        ({"expert_model_parallel_size": 4}, {"moe": EXPERTS},
         "expert_model_parallel_size 4 does not divide num_experts 6"),
        ({"expert_tensor_parallel_size": 3}, {"moe": EXPERTS},
         "expert_tensor_parallel_size 3 does not divide moe_intermediate_size 20"),
        ({"expert_model_parallel_size": 2}, {}, "need a language model with experts"),
        ({"pipeline_model_parallel_size": 4}, {},
         r"first 2 decoder layers \(deepstack\), but the first of 4 pipeline stages holds 1"),
    ],
)  # fmt: skip
def test_what_a_layout_does_not_divide_is_named(
    model: LanguageModel, sizes: dict[str, int], fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(TrainError, match=named):
        check_layout(replace(model, **fields), Layout(**sizes), num_deepstack=2)


def test_all_faults_of_a_layout_are_named_at_once(model: LanguageModel) -> None:
    layout = Layout(tensor_model_parallel_size=3, pipeline_model_parallel_size=3)
    with pytest.raises(TrainError, match=r"layout tp3-pp3: .*heads 8.*; .*num_hidden_layers 4"):
        check_layout(model, layout)


@pytest.mark.parametrize("virtual", [1, 2])
def test_interleaved_stages_always_overlap_their_sends(model: LanguageModel, virtual: int) -> None:
    """Megatron's interleaved schedule on two stages is silently wrong without both switches."""
    layout = Layout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=virtual)
    config = transformer_config(model, layout)
    assert (config.overlap_p2p_comm, config.batch_p2p_comm) == (virtual > 1, virtual == 1)


@pytest.mark.parametrize(
    ("layouts", "num_ranks"),
    [
        ([{}], 1),
        ([{"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}], 2),
        ([{"tensor_model_parallel_size": 2, "expert_model_parallel_size": 3}], 6),
        ([{"pipeline_model_parallel_size": 2, "expert_tensor_parallel_size": 2}], 4),
        ([{"tensor_model_parallel_size": 2}, {"tensor_model_parallel_size": 3}], 6),
    ],
)
def test_the_ranks_that_layouts_need(layouts: list[dict[str, int]], num_ranks: int) -> None:
    assert ranks_for(Layout(**sizes) for sizes in layouts) == num_ranks


@pytest.mark.parametrize(
    ("vocab", "size", "padded"), [(320, 2, 320), (321, 2, 322), (321, 1, 321), (5, 4, 8)]
)
def test_the_vocabulary_is_padded_to_equal_parts(vocab: int, size: int, padded: int) -> None:
    assert padded_vocab_size(vocab, tensor_model_parallel_size=size) == padded
