"""Llama, text only: no biases, no q and k norms."""

from vlmcore.families.decoder import DECODERS
from vlmcore.families.text import text_family

FAMILY = text_family("llama", architecture="LlamaForCausalLM", decoder=DECODERS["llama"])
