"""Adapters and merges against peft itself."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny.adapters import ALL, DENSE, MOE, VISION, hf_model, save_adapter, with_adapter
from tests.tiny.forms import as_hub
from vlmcore.errors import WeightError
from vlmcore.weights.adapter_plan import CONFIG
from vlmcore.weights.adapters import PREFIX, WEIGHTS, PeftAdapter, write_peft
from vlmcore.weights.architecture import check_against_architecture
from vlmcore.weights.merge import merge_adapter

Tensors = dict[str, torch.Tensor]
CASES: dict[str, dict[str, Any]] = {
    "qwen3": DENSE,
    "qwen3_moe": MOE,
    "qwen3_vl": VISION,
    "qwen3_vl_moe": MOE,
    "qwen2_5_vl": {"r": 4, "target_modules": "all-linear"},
    "internvl": {"r": 4, "target_modules": ["q_proj", "fc1", "linear_2"], "lora_alpha": 2},
}
IDS = torch.arange(3, 40)[None]


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest, tiny_model: Callable[..., Path], tmp_path: Path) -> Any:
    """Base and adapter folder."""
    base = tiny_model(request.param)
    return base, save_adapter(base, tmp_path / "adapter", **CASES[request.param])


@pytest.fixture
def dense(tiny_model: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    base = tiny_model("qwen3")
    return base, save_adapter(base, tmp_path / "adapter", **DENSE)


def by_expert(base: Path, target: Path, *, rank: int) -> Path:
    """The adapter of a Qwen3-MoE as transformers 4 had it: an expert's projections apart."""
    from peft import LoraConfig

    generator = torch.Generator().manual_seed(3)
    shapes = {"gate_proj": (40, 48), "up_proj": (40, 48), "down_proj": (48, 40)}
    tensors = {}
    for layer in range(3):
        for expert in range(4):
            for name, (rows, columns) in shapes.items():
                key = f"{PREFIX}model.layers.{layer}.mlp.experts.{expert}.{name}.lora_"
                tensors[f"{key}A.weight"] = torch.randn(rank, columns, generator=generator)
                tensors[f"{key}B.weight"] = torch.randn(rows, rank, generator=generator) * 0.3
    target.mkdir()
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    LoraConfig(r=rank, lora_alpha=1, target_modules=list(shapes)).save_pretrained(target)
    return target


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def test_out_and_in_is_bit_exact_and_peft_takes_it(pair: Any, tmp_path: Path) -> None:
    base, adapter = pair
    write_peft(PeftAdapter(base, adapter), tmp_path / "out")
    before, after = (load_file(folder / WEIGHTS) for folder in (adapter, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert not [key for key in before if not torch.equal(before[key], after[key])]
    assert torch.equal(
        logits(with_adapter(base, adapter)), logits(with_adapter(base, tmp_path / "out"))
    )


def test_the_merged_model_computes_what_base_and_adapter_compute(pair: Any, tmp_path: Path) -> None:
    base, adapter = pair
    report = merge_adapter(
        base, PeftAdapter(base, adapter), tmp_path / "merged", max_shard_size="50KB"
    )
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 3
    check_against_architecture(tmp_path / "merged")
    together = with_adapter(base, adapter)
    expected = logits(together)
    assert (expected - logits(hf_model(base))).abs().max() > 0.1
    assert (logits(hf_model(tmp_path / "merged")) - expected).abs().max() <= 1e-5
    theirs = together.merge_and_unload().state_dict()
    for key, ours in hf_model(tmp_path / "merged").state_dict().items():
        # B · A in fp32, in whatever order
        assert (ours - theirs[key]).abs().max() <= 1e-6 * ours.abs().max().clamp(min=1), key
    stored = load_file(base / "model.safetensors")
    changed = {
        key
        for file in (tmp_path / "merged").glob("*.safetensors")
        for key, tensor in load_file(file).items()
        if not torch.equal(tensor, stored[key])
    }
    assert changed == set(report["merged"])
    assert report["keys_written"] == len(stored)


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_vl_moe", "qwen2_5_vl", "internvl"])
def test_a_base_in_hub_form_merges_to_the_same_model(
    name: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_model(name)
    adapter = save_adapter(base, tmp_path / "adapter", **CASES[name])
    hub = as_hub(base, tmp_path / "hub")
    merge_adapter(hub, PeftAdapter(hub, adapter), tmp_path / "merged")
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == (
        load_file(hub / "model.safetensors").keys()
    )
    found = logits(hf_model(tmp_path / "merged"))
    assert (found - logits(with_adapter(base, adapter))).abs().max() <= 1e-5


def test_an_adapter_in_hub_form_is_the_same_adapter(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_model("qwen2_5_vl")
    adapter = save_adapter(base, tmp_path / "adapter", **CASES["qwen2_5_vl"])
    tensors = load_file(adapter / WEIGHTS)
    hub = {
        key.replace("language_model.", "").replace("model.visual", "visual"): tensor
        for key, tensor in tensors.items()
    }
    assert not hub.keys() & tensors.keys()
    save_file(hub, adapter / WEIGHTS, metadata={"format": "pt"})
    write_peft(PeftAdapter(base, adapter), tmp_path / "out")
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert found.keys() == tensors.keys()
    assert not [key for key in tensors if not torch.equal(found[key], tensors[key])]


def test_adapters_of_single_experts_become_what_peft_makes_of_them(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import PeftModel

    base = tiny_model("qwen3_moe")
    adapter = by_expert(base, tmp_path / "adapter", rank=3)
    source = PeftAdapter(base, adapter)
    expected = logits(PeftModel.from_pretrained(hf_model(base), adapter).eval())
    write_peft(source, tmp_path / "out")
    assert (logits(with_adapter(base, tmp_path / "out")) - expected).abs().max() <= 1e-5
    merge_adapter(base, source, tmp_path / "merged")
    assert (logits(hf_model(tmp_path / "merged")) - expected).abs().max() <= 1e-5


def test_the_sum_is_rounded_once(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    base = shutil.copytree(tiny_model("qwen3"), tmp_path / "base")
    tensors = {key: x.bfloat16() for key, x in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapter = save_adapter(base, tmp_path / "adapter", r=4, lora_alpha=6, target_modules=ALL)
    merge_adapter(base, PeftAdapter(base, adapter), tmp_path / "merged")
    factors, key = load_file(adapter / WEIGHTS), "model.layers.2.mlp.down_proj"
    a, b = (factors[f"{PREFIX}{key}.lora_{x}.weight"].double() for x in "AB")
    expected = (tensors[f"{key}.weight"].double() + 1.5 * b @ a).bfloat16()
    found = load_file(tmp_path / "merged" / "model.safetensors")[f"{key}.weight"]
    assert found.dtype == torch.bfloat16
    assert (found == expected).float().mean() > 0.999  # fp32 sums may fall beside a tie


def test_global_tensors_are_stacked_and_padded_to_the_largest_rank(
    dense: tuple[Path, Path],
) -> None:
    source = PeftAdapter(*dense)
    stored = load_file(dense[1] / WEIGHTS)
    shapes = source.plan.global_shapes
    gate = "decoder.layers.mlp.linear_fc1.adapter.gate"
    assert shapes[f"{gate}.lora_A"] == (3, 7, 48)
    assert shapes[f"{gate}.lora_B"] == (3, 80, 7)
    whole = {key: source.read(key, (0,) * len(shape), shape) for key, shape in shapes.items()}
    theirs = f"{PREFIX}model.layers.0.mlp.gate_proj.lora_"
    assert torch.equal(whole[f"{gate}.lora_A"][0, :4], stored[f"{theirs}A.weight"])
    assert torch.equal(whole[f"{gate}.lora_B"][0, :, :4], stored[f"{theirs}B.weight"])
    assert not whole[f"{gate}.lora_A"][0, 4:].any()
    assert not whole[f"{gate}.lora_B"][0, ..., 4:].any()
    absent = whole["decoder.layers.self_attention.linear_qkv.adapter.v.lora_B"]
    assert not absent[1].any()
    assert absent[2].any()
    box = source.read(f"{gate}.lora_B", (2, 20, 0), (1, 40, 7))
    assert torch.equal(box, whole[f"{gate}.lora_B"][2:, 20:60])


Q = f"{PREFIX}model.layers.1.self_attn.q_proj.lora_"


def lose_a_factor(tensors: Tensors) -> None:
    del tensors[f"{Q}B.weight"]


def cut_a_factor(tensors: Tensors) -> None:
    tensors[f"{Q}A.weight"] = tensors[f"{Q}A.weight"][:, :-1].contiguous()


def add_a_module(tensors: Tensors) -> None:
    tensors[f"{PREFIX}model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.ones(4, 48)


def raise_a_rank(tensors: Tensors) -> None:
    for factor, dim in (("A", 0), ("B", 1)):
        tensors[f"{Q}{factor}.weight"] = tensors[f"{Q}{factor}.weight"].repeat_interleave(2, dim)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lose_a_factor, r"layers\.1\.self_attn\.q_proj\.lora_B\.weight: missing, expected \(64, 4"),
        (cut_a_factor, r"q_proj\.lora_A\.weight: shape \(4, 47\), expected \(4, 48\)"),
        (add_a_module, r"layers\.9\.self_attn\.q_proj\.lora_A\.weight: unexpected"),
        (raise_a_rank, r"q_proj\.lora_B\.weight: shape \(64, 8\), expected \(64, 4\)"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    dense: tuple[Path, Path], change: Callable[[Tensors], None], fault: str
) -> None:
    base, adapter = dense
    tensors = load_file(adapter / WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(WeightError, match=fault):
        PeftAdapter(base, adapter)


def test_an_adapter_of_another_base_is_refused_with_every_difference(
    dense: tuple[Path, Path], tiny_model: Callable[..., Path]
) -> None:
    other = tiny_model("qwen3", hidden_size=64)
    with pytest.raises(WeightError, match="fits only the base it was trained on") as refusal:
        PeftAdapter(other, dense[1])
    assert str(refusal.value).count("expected (4, 64)") > 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1, 2]),
        ("init_lora_weights", "pissa"),
    ],
)
def test_what_is_more_than_lora_is_refused_by_name(
    dense: tuple[Path, Path], field: str, value: object
) -> None:
    base, adapter = dense
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | {field: value}))
    with pytest.raises(WeightError, match=f"{field} is "):
        PeftAdapter(base, adapter)


def test_embeddings_and_another_method_are_refused(
    dense: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = dense
    config = json.loads((adapter / CONFIG).read_text())
    changed = config | {"target_modules": ["embed_tokens", "q_proj"]}
    (adapter / CONFIG).write_text(json.dumps(changed))
    with pytest.raises(WeightError, match=r"model\.embed_tokens: a Embedding"):
        PeftAdapter(base, adapter)
    (adapter / CONFIG).write_text(json.dumps(config | {"target_modules": ["no_proj"]}))
    with pytest.raises(WeightError, match="No modules were targeted"):
        PeftAdapter(base, adapter)
    (adapter / CONFIG).write_text(json.dumps({"peft_type": "IA3", "target_modules": ["q_proj"]}))
    with pytest.raises(WeightError, match="expected LORA"):
        PeftAdapter(base, adapter)
    (adapter / CONFIG).unlink()
    with pytest.raises(WeightError, match=f"{CONFIG} is missing"):
        PeftAdapter(base, adapter)


def test_a_head_tied_to_the_embeddings_is_not_merged(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_model("qwen3", tied=True)
    adapter = save_adapter(base, tmp_path / "adapter", r=2, target_modules=["lm_head", "q_proj"])
    with pytest.raises(WeightError, match="lm_head"):
        merge_adapter(base, PeftAdapter(base, adapter), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
