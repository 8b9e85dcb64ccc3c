"""Qwen2 and Qwen2.5, text only: biases on q, k and v."""

from vlmcore.families.decoder import DECODERS
from vlmcore.families.text import text_family

FAMILY = text_family("qwen2", architecture="Qwen2ForCausalLM", decoder=DECODERS["qwen2"])
