"""LLaVA 1.5 and 1.6-like: CLIP or SigLIP tower, two-layer projector, any decoder."""

from vlmcore.families.base import Vision
from vlmcore.families.decoder import text_decoder
from vlmcore.families.shell import shell_family

DISK_PREFIXES = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}
# published towers keep the inner name of transformers 4, which had it in memory too
TOWER_ON_DISK = {
    "vision_tower.vision_model.": "model.vision_tower.",
    "model.vision_tower.vision_model.": "model.vision_tower.",
}

FAMILY = shell_family(
    "llava",
    architecture="LlavaForConditionalGeneration",
    vit="model.vision_tower.",
    aligner=("model.multi_modal_projector.",),
    decoder=text_decoder,
    vision=Vision(
        tokens={"image_token_index": "<image>"},
        image_token="<image>",
        video_token=None,
        mrope=False,
    ),
    disk_prefixes={**TOWER_ON_DISK, **DISK_PREFIXES},
)
