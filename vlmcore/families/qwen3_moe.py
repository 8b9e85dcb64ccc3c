"""Qwen3-MoE, text only: Qwen3 with experts in every layer."""

from vlmcore.families.decoder import DECODERS
from vlmcore.families.text import text_family

FAMILY = text_family("qwen3_moe", architecture="Qwen3MoeForCausalLM", decoder=DECODERS["qwen3_moe"])
