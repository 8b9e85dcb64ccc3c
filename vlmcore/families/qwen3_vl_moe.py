"""Qwen3-VL with experts: Qwen3-MoE decoder; published weights hold fused experts input first."""

from vlmcore.families.decoder import DECODERS
from vlmcore.families.qwen_vision import MERGER, VIT, qwen_vision
from vlmcore.families.shell import shell_family

FAMILY = shell_family(
    "qwen3_vl_moe",
    architecture="Qwen3VLMoeForConditionalGeneration",
    vit=VIT,
    aligner=(MERGER, "model.visual.deepstack_merger_list."),
    decoder=lambda _: DECODERS["qwen3_moe"],
    vision=qwen_vision(mrope=True),
    input_first_experts=True,
)
