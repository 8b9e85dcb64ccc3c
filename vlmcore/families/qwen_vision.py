"""What the vision sides of Qwen2.5-VL, Qwen3-VL and the Exaone shell have in common."""

from vlmcore.families.base import Vision

VIT = "model.visual."
MERGER = "model.visual.merger."
TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def qwen_vision(*, mrope: bool) -> Vision:
    """Tokens of Qwen's vision-language models; positions are 1-D where a foreign LLM reads them."""
    return Vision(
        tokens=TOKENS,
        image_token=TOKENS["image_token_id"],
        video_token=TOKENS["video_token_id"],
        mrope=mrope,
        pixel_limits=("max_pixels", "min_pixels", "video_max_pixels"),
    )
