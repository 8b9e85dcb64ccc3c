"""Adapters on Megatron ranks against peft on transformers, fp32."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny.adapters import DENSE, MOE, VISION, save_adapter, with_adapter
from vlmcore.training.launch import launch
from vlmcore.weights.adapters import WEIGHTS, McoreAdapter, PeftAdapter, write_peft
from vlmcore.weights.merge import merge_adapter

TP = "tensor_model_parallel_size"
PP = "pipeline_model_parallel_size"
EP = "expert_model_parallel_size"
ETP = "expert_tensor_parallel_size"
SP: dict[str, Any] = {TP: 2, "sequence_parallel": True}

LAYOUTS = {
    "dense": [{TP: 2}, {}, {TP: 4, "sequence_parallel": True}, SP, {PP: 2}],
    "moe": [{EP: 2}, {ETP: 2}, SP | {EP: 2}, {PP: 2, EP: 2}],
    "vision-language": [{}, {TP: 2}, SP],
}

REFUSED = [
    "tensor_model_parallel_size 4 cuts inside the 2 kv heads",
    "output_layer: no adapter on lm_head",
    "lora_dropout is 0.1",
]


@pytest.fixture(scope="module")
def models(tiny_model: Callable[..., Path]) -> dict[str, tuple[Path, dict[str, Any]]]:
    four_layers = {"num_hidden_layers": 4}
    return {
        "dense": (
            tiny_model("qwen3", **four_layers, num_attention_heads=8, num_key_value_heads=4),
            DENSE,
        ),
        "moe": (tiny_model("qwen3_moe", **four_layers), MOE),
        "vision-language": (tiny_model("qwen3_vl"), VISION),
    }


def reference(base: Path, adapter: Path, target: Path, *, sample: int) -> dict[str, torch.Tensor]:
    """Writes logits and loss weights of peft on transformers; gives the adapter's gradients."""
    from vlmcore.training.precision_samples import precision_samples

    model = with_adapter(base, adapter)
    logits = model(**precision_samples(base)[sample].inputs).logits[0]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    (logits * weights).sum().backward()
    torch.save({"logits": logits.detach(), "weights": weights}, target)
    return {
        name.replace(".default", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }


@pytest.mark.slow
def test_adapters_compute_learn_and_travel_at_every_layout(
    models: dict[str, tuple[Path, dict[str, Any]]], tmp_path: Path
) -> None:
    cases, gradients = {}, {}
    for name, (base, config) in models.items():
        folder = tmp_path / name
        adapter = save_adapter(base, folder / "adapter", **config)
        sample = 2 if name == "vision-language" else 0  # 2: images of different sizes
        gradients[name] = reference(base, adapter, folder / "reference.pt", sample=sample)
        cases[name] = {
            "base": str(base),
            "adapter": str(adapter),
            "sample": sample,
            "reference": str(folder / "reference.pt"),
            "layouts": LAYOUTS[name],
            "out": str(folder / "out"),
        }
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    launch(
        "tests.models.lora_ranks",
        [str(tmp_path / "cases.json"), str(tmp_path / "results.json")],
        nproc_per_node=4,
        log_path=tmp_path / "log",
    )
    found = json.loads((tmp_path / "results.json").read_text())
    results = found["layouts"]
    assert len(results) == sum(map(len, LAYOUTS.values()))
    for where, result in results.items():
        assert result["max_diff"] <= 1e-5, (where, result)
        assert result["resharded"], where
        assert result["only_adapters_train"], where
        assert result["adapters_here"], where
    for message, named in zip(found["refused"], REFUSED, strict=True):
        assert named in message
    for name, (base, _) in models.items():
        stored = load_file(tmp_path / name / "adapter" / WEIGHTS)
        fresh = []
        for out in sorted((tmp_path / name / "out").iterdir()):
            assert_equal(exported(base, out / "saved"), stored)
            fresh.append(exported(base, out / "fresh"))
            assert_equal(fresh[-1], fresh[0])
            if (out / "gradients").exists():
                assert_close(exported(base, out / "gradients"), gradients[name])
        assert_untrained(fresh[0])
        assert_merges_alike(base, tmp_path / name)


def exported(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """A Megatron adapter as peft's tensors."""
    write_peft(McoreAdapter(base, folder), folder / "peft")
    return load_file(folder / "peft" / WEIGHTS)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert not [key for key in expected if not torch.equal(found[key], expected[key])]


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """To fp32's rounding of sums over tokens, relative to each tensor's largest element."""
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert gradient.abs().max() > 0, key
        difference = (found[key] - gradient).abs().max() / gradient.abs().max()
        assert difference <= 1e-5, (key, float(difference))


def assert_merges_alike(base: Path, folder: Path) -> None:
    """An adapter straight from Megatron gives the merged model that peft's folder gives."""
    saved = next((folder / "out").iterdir()) / "saved"
    merge_adapter(base, McoreAdapter(base, saved), folder / "from_mcore")
    merge_adapter(base, PeftAdapter(base, folder / "adapter"), folder / "from_peft")
    assert_equal(
        *(load_file(folder / f"from_{x}" / "model.safetensors") for x in ("mcore", "peft"))
    )


def assert_untrained(tensors: dict[str, torch.Tensor]) -> None:
    """As peft begins: B zero; A uniform within 1 / √in, no two alike."""
    firsts = []
    for key, tensor in tensors.items():
        if ".lora_B." in key:
            assert not tensor.any(), key
            continue
        bound = tensor.shape[1] ** -0.5
        assert 0.8 * bound < tensor.abs().max() <= bound, key
        firsts.append(float(tensor[0, 0]))
    assert len(set(firsts)) == len(firsts)
