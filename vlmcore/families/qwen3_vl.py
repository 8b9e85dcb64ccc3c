"""Qwen3-VL, dense: Qwen3 decoder with interleaved M-RoPE, a ViT with deepstack mergers."""

from vlmcore.families.decoder import DECODERS
from vlmcore.families.qwen_vision import MERGER, VIT, qwen_vision
from vlmcore.families.shell import shell_family

FAMILY = shell_family(
    "qwen3_vl",
    architecture="Qwen3VLForConditionalGeneration",
    vit=VIT,
    aligner=(MERGER, "model.visual.deepstack_merger_list."),
    decoder=lambda _: DECODERS["qwen3"],
    vision=qwen_vision(mrope=True),
)
