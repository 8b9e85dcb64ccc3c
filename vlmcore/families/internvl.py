"""InternVL in HF format: InternViT tiles, pixel-shuffle projector, any decoder; video as frames."""

from vlmcore.families.base import Vision
from vlmcore.families.decoder import text_decoder
from vlmcore.families.llava import DISK_PREFIXES
from vlmcore.families.shell import shell_family

FAMILY = shell_family(
    "internvl",
    architecture="InternVLForConditionalGeneration",
    vit="model.vision_tower.",
    aligner=("model.multi_modal_projector.",),
    decoder=text_decoder,
    vision=Vision(
        tokens={"image_token_id": "<IMG_CONTEXT>"},
        image_token="<IMG_CONTEXT>",
        video_token=None,
        mrope=False,
        pixel_limits=("max_pixels", "min_pixels"),
    ),
    disk_prefixes=DISK_PREFIXES,
)
