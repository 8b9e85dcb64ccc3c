from dataclasses import replace

import pytest

from vlmcore.errors import TrainError
from vlmcore.families import FAMILIES, LanguageModel
from vlmcore.models.language_model import check_tensor_parallel, padded_vocab_size


@pytest.fixture
def model() -> LanguageModel:
    config = {
        "num_hidden_layers": 2,
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


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_divisor_of_every_cut_dimension_is_taken(model: LanguageModel, size: int) -> None:
    check_tensor_parallel(model, size)


@pytest.mark.parametrize(
    ("size", "fields", "named"),
    [
        (8, {}, "num_key_value_heads 4"),
        (3, {}, "num_attention_heads 8"),
        (4, {"ffn_hidden_size": 90}, "intermediate_size 90"),
    ],
)
def test_a_size_that_does_not_divide_is_refused(
    model: LanguageModel, size: int, fields: dict, named: str
) -> None:
    message = f"tensor_model_parallel_size {size} does not divide {named} of the language model"
    with pytest.raises(TrainError, match=message):
        check_tensor_parallel(replace(model, **fields), size)


@pytest.mark.parametrize(
    ("vocab", "size", "padded"), [(320, 2, 320), (321, 2, 322), (321, 1, 321), (5, 4, 8)]
)
def test_the_vocabulary_is_padded_to_equal_parts(vocab: int, size: int, padded: int) -> None:
    assert padded_vocab_size(vocab, tensor_model_parallel_size=size) == padded
