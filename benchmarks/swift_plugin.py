"""What `train_cpu.py` has ms-swift 4.6.0 load (`--external_plugins`): a clock, and a correction.

The clock writes when each optimizer step ended and what it took in. The correction: ms-swift takes
the image token for id 151655 whatever the tokenizer says, and would train this tiny model on
placeholders that stand for nothing.
"""

import json
import os
import time
from pathlib import Path

from swift.callbacks import TrainerCallback, callbacks_map
from swift.template.templates.qwen import Qwen2VLTemplate

CONFIG = json.loads((Path(os.environ["TRAIN_CPU_MODEL"]) / "config.json").read_text())
CLOCK = Path(os.environ["TRAIN_CPU_CLOCK"])

Qwen2VLTemplate.image_token_id = CONFIG["image_token_id"]
Qwen2VLTemplate.video_token_id = CONFIG["video_token_id"]


class StepClock(TrainerCallback):
    """One line of seconds since the epoch for each optimizer step."""

    def on_step_end(self, args, state, control, **kwargs):
        with CLOCK.open("a") as file:
            file.write(f"{time.time()}\n")


callbacks_map["step_clock"] = StepClock
