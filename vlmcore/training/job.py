"""What a training process is told: one JSON file, written by the stage and read by every rank."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from vlmcore.recipe.train_stage import TrainStage
from vlmcore.weights.sidecar import config_dir

METRICS = "metrics.jsonl"
TRAINABLE = "trainable.json"
ADAPTER = "adapter"


class TrainJob(BaseModel):
    """One training stage with its folders.

    Attributes:
        stage: The recipe's stage.
        model_dir: Model folder to start from, Megatron (`checkpoint/` and `hf/`) or HF.
        datasets: Energon dataset → how often it is drawn from, relative to the others.
        output_dir: Gets the trained model folder in the same form, the metrics and the trainable
            table; of a LoRA stage also the adapter as peft's folder, which the model has merged.
        scratch_dir: Periodic checkpoints and the metrics so far; a job that finds them there goes
            on from them.
        cache_dir: Where the ranks keep encoded samples, for this job and others; None: nowhere.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: TrainStage
    model_dir: Path
    datasets: dict[Path, float]
    output_dir: Path
    scratch_dir: Path
    cache_dir: Path | None = None

    @property
    def hf_dir(self) -> Path:
        """Where config, tokenizer and processor stand."""
        return config_dir(self.model_dir)
