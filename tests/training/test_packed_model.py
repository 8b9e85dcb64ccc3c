from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.tiny.adapters import hf_model
from tests.tiny.megatron import stage
from tests.tiny.rows import row_of, token_sample, transformers_inputs
from vlmcore.dataloading.encode import IGNORED, ConversationEncoder, dummy_vision_inputs
from vlmcore.dataloading.samples import TokenSample
from vlmcore.errors import TrainError
from vlmcore.families import FAMILIES
from vlmcore.training.packed_model import PackedModel, row_inputs
from vlmcore.training.transformers_engine import param_groups
from vlmcore.training.transformers_model import build, trainable_table

CPU = torch.device("cpu")
TinyModel = Callable[..., Path]


def samples_of(encoder: ConversationEncoder) -> list[TokenSample]:
    """Text and, where the model sees, images of several sizes; every label has its own weight."""
    text = token_sample(encoder, "What is 12 + 30?", "42", "And half of it?", "21", images=[])
    long = token_sample(encoder, "Count.", "1 2 3 4 5 6 7 8 9 10 11", images=[])
    samples = [text, long]
    if encoder.family.vision is not None:
        two = token_sample(encoder, "Compare.", "Not alike.", images=[(64, 64), (128, 32)])
        samples = [text, two, long, token_sample(encoder, "Read.", "7", images=[(96, 64)])]
    for sample in samples:
        sample.loss_scale = sample.loss_scale * torch.arange(1, len(sample.loss_scale) + 1) / 7
    return samples


def packed_model(hf_dir: Path, **fields: Any) -> PackedModel:
    idle = dummy_vision_inputs(ConversationEncoder(hf_dir, task="sft"))
    packed, _ = build(stage(engine="transformers", **fields), hf_dir, idle_inputs=idle)
    return packed


def reference(model: Any, sample: TokenSample) -> torch.Tensor:
    """The weighted loss of a sample by the whole model of transformers, alone in its row."""
    ids = sample.input_ids[None]
    extra: dict[str, Any] = transformers_inputs(sample.vision)
    if extra:
        extra["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    logits = model(input_ids=ids, **extra).logits[0]
    losses = F.cross_entropy(logits, sample.labels, ignore_index=IGNORED, reduction="none")
    return (losses * sample.loss_scale).sum()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_packed_row_is_its_samples_alone(family: str, tiny_model: TinyModel) -> None:
    hf_dir = tiny_model(family)
    samples = samples_of(ConversationEncoder(hf_dir, task="sft"))
    plain, packed = hf_model(hf_dir), packed_model(hf_dir)
    expected = sum(reference(plain, sample) for sample in samples)
    expected.backward()
    found = packed(**row_inputs(row_of(samples), CPU)).total
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    wanted = dict(plain.named_parameters())
    # the gradient of a key's bias is zero but for rounding, which is of the size of others'
    noise = 1e-6 * max(float(w.grad.abs().max()) for w in wanted.values() if w.grad is not None)
    for name, weight in packed.model.named_parameters():
        if weight.requires_grad:
            gradient = wanted[name].grad
            assert gradient is not None, name
            torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=noise)


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl", "llava_onevision", "llava"])
def test_a_row_without_an_image_reaches_the_same_weights(
    family: str, tiny_model: TinyModel
) -> None:
    hf_dir = tiny_model(family)
    encoder = ConversationEncoder(hf_dir, task="sft")
    packed = packed_model(hf_dir)
    row = row_of([token_sample(encoder, "Hi", "Hello", images=[])])
    packed(**row_inputs(row, CPU)).total.backward()
    trained = {n: w for n, w in packed.named_parameters() if w.requires_grad}
    assert all(weight.grad is not None for weight in trained.values())
    assert not any(
        w.grad.any() for n, w in trained.items() if "language" not in n and "head" not in n
    )


def test_a_frozen_vision_side_rests_in_rows_of_text(tiny_model: TinyModel) -> None:
    hf_dir = tiny_model("qwen3_vl")
    assert not packed_model(hf_dir, freeze_vit=True, freeze_aligner=True).idle_inputs


def test_logits_in_chunks_give_the_same_gradients(tiny_model: TinyModel) -> None:
    hf_dir = tiny_model("qwen3")
    row = row_of(samples_of(ConversationEncoder(hf_dir, task="sft")))
    gradients = []
    for max_length in (1000, 50_000):  # more chunks than trained tokens
        packed = packed_model(hf_dir, max_length=max_length)
        packed(**row_inputs(row, CPU)).total.backward()
        gradients.append([weight.grad for weight in packed.parameters()])
    for one, other in zip(*gradients, strict=True):
        noise = 1e-6 * float(one.abs().max())
        torch.testing.assert_close(one, other, rtol=1e-5, atol=noise)


def test_the_table_counts_what_trains_by_group(tiny_model: TinyModel) -> None:
    hf_dir = tiny_model("qwen3_vl")
    whole = trainable_table(packed_model(hf_dir).model, FAMILIES["qwen3_vl"])
    table = trainable_table(
        packed_model(hf_dir, freeze_vit=True, freeze_llm=True).model, FAMILIES["qwen3_vl"]
    )
    assert all(row["trainable"] == row["parameters"] for row in whole.values())
    assert {group: row["parameters"] for group, row in table.items()} == {
        group: row["parameters"] for group, row in whole.items()
    }
    assert table["aligner"] == whole["aligner"]
    assert table["vit"]["trainable"] == table["llm"]["trainable"] == 0


def test_groups_of_weights_have_rates_and_decay_of_their_own(tiny_model: TinyModel) -> None:
    packed = packed_model(tiny_model("qwen3_vl"))
    told = stage(engine="transformers", vit_lr=0.03, aligner_lr=0.2)
    groups = param_groups(packed, told, FAMILIES["qwen3_vl"])
    assert {(group["lr"], group["weight_decay"]) for group in groups} == {
        (rate, decay) for rate in (0.03, 0.2, 0.1) for decay in (0.1, 0.0)
    }
    count = sum(len(group["params"]) for group in groups)
    assert count == len(list(packed.parameters()))


def test_nothing_to_train_is_refused(tiny_model: TinyModel) -> None:
    with pytest.raises(TrainError, match="nothing is trainable"):
        packed_model(tiny_model("qwen3"), freeze_llm=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="qlora may run here")
def test_qlora_is_refused_without_a_gpu(tiny_model: TinyModel) -> None:
    with pytest.raises(TrainError, match="qlora needs a CUDA device.*use lora"):
        packed_model(tiny_model("qwen3"), tuner_type="qlora")


def test_dora_on_experts_is_refused_and_on_attention_is_not(tiny_model: TinyModel) -> None:
    hf_dir = tiny_model("qwen3_moe")
    with pytest.raises(TrainError, match="no DoRA for stacked experts.*name linear layers"):
        packed_model(hf_dir, tuner_type="dora")
    packed = packed_model(hf_dir, tuner_type="dora", target_modules=("q_proj",))
    trained = {name for name, weight in packed.named_parameters() if weight.requires_grad}
    assert {name.partition("q_proj.")[2].split(".")[0] for name in trained} == {
        "lora_A", "lora_B", "lora_magnitude_vector",
    }  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", ["qwen3", "qwen2_5_vl", "qwen3_vl"])
def test_the_kernel_on_a_gpu_gives_the_loss_of_the_cpu(family: str, tiny_model: TinyModel) -> None:
    hf_dir = tiny_model(family)
    row = row_of(samples_of(ConversationEncoder(hf_dir, task="sft")))
    packed = packed_model(hf_dir, torch_dtype="bfloat16")
    found = packed(**row_inputs(row, torch.device("cuda"))).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = packed.cpu()(**row_inputs(row, CPU)).total
    torch.testing.assert_close(found.cpu(), expected, rtol=2e-2, atol=0)
