"""Qwen2.5-VL: Qwen2 decoder with chunked M-RoPE, a ViT with window attention and one merger."""

from vlmcore.families.decoder import DECODERS
from vlmcore.families.qwen_vision import MERGER, VIT, qwen_vision
from vlmcore.families.shell import shell_family

FAMILY = shell_family(
    "qwen2_5_vl",
    architecture="Qwen2_5_VLForConditionalGeneration",
    vit=VIT,
    aligner=(MERGER,),
    decoder=lambda _: DECODERS["qwen2"],
    vision=qwen_vision(mrope=True),
    disk_prefixes={
        "visual.": VIT,
        "model.layers.": "model.language_model.layers.",
        "model.embed_tokens.": "model.language_model.embed_tokens.",
        "model.norm.": "model.language_model.norm.",
    },
)
