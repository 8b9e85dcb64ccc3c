"""energon's CaptioningSample of a sample with one image and one answer, its caption."""


def part_filter(part: str) -> bool:
    """Every member is needed: images are named by their kind."""
    return True


def sample_loader(raw: dict) -> dict:
    """The image and its caption; what was asked is left out."""
    answers = [turn["content"] for turn in raw["json"]["messages"] if turn["role"] == "assistant"]
    images = raw["json"]["images"]
    if len(images) != 1 or len(answers) != 1:
        raise ValueError(f"{raw['__key__']}: not one caption of one image; use sample type chat")
    return {"image": raw[images[0]], "caption": answers[0]}
