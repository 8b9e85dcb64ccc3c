"""What stages hand to each other: a small name for one published artifact."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict


class ArtifactRef(BaseModel):
    """One published artifact: the stage that made it, the key it was built for, what is inside."""

    model_config = ConfigDict(frozen=True)

    stage: str
    """Instance name, such as `train.full`."""
    key: str
    """sha256 of what the content was made from (`keys.compute_key`)."""
    digest: str
    """sha256 of the content itself (`manifest.content_digest`)."""
    path: Path
    """The folder, for reading only."""

    def __str__(self) -> str:
        return f"{self.stage}@{self.digest[:16]}"
