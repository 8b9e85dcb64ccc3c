"""Qwen3, dense, text only: no biases, q and k normalised per head."""

from vlmcore.families.decoder import DECODERS
from vlmcore.families.text import text_family

FAMILY = text_family("qwen3", architecture="Qwen3ForCausalLM", decoder=DECODERS["qwen3"])
