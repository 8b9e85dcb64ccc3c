"""What docs/data.md tells people to write is what a recipe takes."""

import re
from pathlib import Path

import yaml

from vlmcore.recipe.schema import Dataset

DOCS = Path(__file__).parents[2] / "docs" / "data.md"


def test_every_dataset_of_the_docs_is_valid() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    found = {
        name: Dataset(**fields)
        for block in blocks
        for name, fields in yaml.safe_load(block)["data"].items()
    }
    assert found["llava_pretrain"].split_ratios == (9, 1, 0)
    assert found["latex_ocr"].subset == "human_handwrite"
    assert found["latex_ocr"].limit == 5000
    assert found["video_chats"].weight == 0.5
    assert len(found) == 6
