"""energon's VQASample of a sample with one image, one question and its answer."""


def part_filter(part: str) -> bool:
    """Every member is needed: images are named by their kind."""
    return True


def sample_loader(raw: dict) -> dict:
    """The image, the question without its tag, and the answer."""
    turns = {turn["role"]: turn["content"] for turn in raw["json"]["messages"]}
    images = raw["json"]["images"]
    if len(images) != 1 or len(raw["json"]["messages"]) - ("system" in turns) != 2:
        raise ValueError(
            f"{raw['__key__']}: not one question about one image; use sample type chat"
        )
    return {
        "image": raw[images[0]],
        "context": turns["user"].replace("<image>", "").strip(),
        "answers": [turns["assistant"]],
    }
