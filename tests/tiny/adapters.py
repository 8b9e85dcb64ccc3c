"""Adapters that peft makes and saves on tiny models, drawn large enough to show in the logits."""

from pathlib import Path
from typing import Any

import torch

from vlmcore.families import FAMILIES, read_config

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# ranks differ between projections of one fused layer and between layers; v has none in layer 1
DENSE = {
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ALL,
    "exclude_modules": ["layers.1.self_attn.v_proj"],
    "rank_pattern": {"k_proj": 2, r"layers\.2\..*\.gate_proj": 7, "o_proj": 3},
    "alpha_pattern": {"o_proj": 9, r"layers\.0\..*": 5},
}
MOE = {
    "r": 3,
    "lora_alpha": 4,
    "target_modules": ["q_proj", "o_proj"],
    "target_parameters": FUSED_EXPERTS,
    "rank_pattern": {r"layers\.1\.mlp\.experts\.gate_up_proj": 5},
}
VISION = {
    "r": 4,
    "lora_alpha": 4,
    "use_rslora": True,
    "target_modules": r".*\.(qkv|attn\.proj|linear_fc1|linear_fc2|q_proj|v_proj|down_proj)",
}


def hf_model(folder: Path) -> Any:
    """The transformers model of a folder, fp32."""
    import transformers

    cls = getattr(transformers, FAMILIES[read_config(folder)["model_type"]].architecture)
    return cls.from_pretrained(folder, dtype=torch.float32).eval()


def save_adapter(base_dir: Path, target: Path, *, seed: int = 0, **config: Any) -> Path:
    """A peft adapter folder with A and B drawn at random."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(hf_model(base_dir), LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(0.0, 0.15, generator=generator)
    model.save_pretrained(target)
    return target


def with_adapter(base_dir: Path, adapter_dir: Path, *, use_dora: bool = False) -> Any:
    """Base and adapter as peft runs them; of DoRA the magnitudes are those of the base.

    Raises:
        AssertionError: peft misses a tensor of the adapter, or finds one too many.
    """
    from peft import LoraConfig, get_peft_model
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    config = LoraConfig.from_pretrained(str(adapter_dir))
    config.inference_mode, config.use_dora = False, use_dora
    model = get_peft_model(hf_model(base_dir), config).eval()
    stored = load_peft_weights(str(adapter_dir))
    result = set_peft_model_state_dict(model, stored)
    assert not result.unexpected_keys
    lost = [key for key in result.missing_keys if "lora_" in key]
    assert all(use_dora and "magnitude" in key for key in lost), lost
    return model
