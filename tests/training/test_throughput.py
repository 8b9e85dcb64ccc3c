from pathlib import Path

import pytest
import torch.distributed as dist

from vlmcore.families import FAMILIES
from vlmcore.recipe.train_stage import TrainStage
from vlmcore.training.throughput import Throughput

STAGE = {"name": "s", "data": ("d",), "train_iters": 1}
CONFIG = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip


def test_work_is_six_operations_a_weight_and_token_and_four_when_frozen() -> None:
    """Qwen3-8B: 6.95 billion weights in layers, 0.62 in the head (its model card: 6.95 without
    embeddings)."""
    model = FAMILIES["qwen3"].language_model(CONFIG)
    counts = {"tokens": 1000, "loss_tokens": 100, "attended_pairs": 0}
    layers, head = 6.946e9 * 1000, 0.6223e9 * 100
    full = Throughput(model, TrainStage(**STAGE)).flops(counts)
    lora = Throughput(model, TrainStage(**STAGE, tuner_type="lora")).flops(counts)
    assert abs(full / (6 * (layers + head)) - 1) < 1e-3
    assert abs(lora / (4 * (layers + head)) - 1) < 1e-3
    pairs = Throughput(model, TrainStage(**STAGE)).flops(counts | {"attended_pairs": 10})
    assert pairs - full == 3 * 4 * 36 * 4096 * 10


def test_rows_are_as_full_as_their_tokens_of_max_length(tmp_path: Path) -> None:
    model = FAMILIES["qwen3"].language_model(CONFIG)
    counts = {"tokens": 750, "loss_tokens": 100, "attended_pairs": 0, "samples": 9}
    fields = STAGE | {"max_length": 200, "global_batch_size": 4}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        packed = Throughput(model, TrainStage(**fields))(counts, step_s=0.5)
        unpacked = Throughput(model, TrainStage(**fields, packing=False))(counts, step_s=0.5)
    finally:
        dist.destroy_process_group()
    assert packed["packing_fill"] == pytest.approx(750 / 800)
    assert packed["tokens_per_s"] == pytest.approx(1500)
    assert "packing_fill" not in unpacked
