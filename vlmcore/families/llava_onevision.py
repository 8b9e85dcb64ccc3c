"""LLaVA-OneVision: SigLIP tower over tiles of any resolution, projector, learned line breaks."""

from vlmcore.families.base import Vision
from vlmcore.families.decoder import text_decoder
from vlmcore.families.llava import DISK_PREFIXES, TOWER_ON_DISK
from vlmcore.families.shell import shell_family

FAMILY = shell_family(
    "llava_onevision",
    architecture="LlavaOnevisionForConditionalGeneration",
    vit="model.vision_tower.",
    aligner=("model.multi_modal_projector.", "model.image_newline"),
    decoder=text_decoder,
    vision=Vision(
        tokens={"image_token_index": "<image>", "video_token_index": "<video>"},
        image_token="<image>",
        video_token="<video>",
        mrope=False,
    ),
    disk_prefixes={**TOWER_ON_DISK, **DISK_PREFIXES, "image_newline": "model.image_newline"},
)
