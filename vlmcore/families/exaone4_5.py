"""The EXAONE 4.5 class as a shell: Qwen2.5-VL's tower in front of any decoder, 1-D positions.

With `num_key_value_heads` equal to `num_heads` its tower computes what Qwen2.5-VL's does under the
same key names, so it holds the literal tower of Qwen2.5-VL and a Qwen3 LLM exactly
(transformers 5.19).
"""

from vlmcore.families.decoder import text_decoder
from vlmcore.families.qwen_vision import MERGER, VIT, qwen_vision
from vlmcore.families.shell import shell_family

FAMILY = shell_family(
    "exaone4_5",
    architecture="Exaone4_5_ForConditionalGeneration",
    vit=VIT,
    aligner=(MERGER,),
    decoder=text_decoder,
    vision=qwen_vision(mrope=False),
    # vLLM 0.32's own class builds EXAONE's text model, whatever text_config names
    vllm_model_impl="transformers",
)
