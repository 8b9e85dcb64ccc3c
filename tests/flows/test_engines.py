"""Which conversions stand before stages of either engine; nothing is built here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CONVERSIONS = {"to_mcore", "to_mcore.llm", "precision", "precision.llm"}


def conversions(store: Path, *stages: str) -> set[str]:
    """The planned ones, where these stages of the demo run on engine transformers."""
    engines = [f"--set=train.{stage}.engine=transformers" for stage in stages]
    done = subprocess.run(
        [sys.executable, "-m", "flows", "plan", "handwritten_numbers", "--json",
         "--store", str(store), *engines],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {stage["name"] for stage in json.loads(done.stdout)["stages"]} & CONVERSIONS


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ((), {"to_mcore", "to_mcore.llm"}),
        (("teach",), {"to_mcore"}),
        # the other stage reads the HF model too, which the precision test has to prove
        (("full",), {"to_mcore.llm", "precision"}),
        (("teach", "align", "full"), set()),
    ],
    ids=["none", "of the llm", "the last", "all"],
)
def test_a_stage_of_engine_transformers_starts_from_an_hf_folder(
    tmp_path: Path, stages: tuple[str, ...], expected: set[str]
) -> None:
    assert conversions(tmp_path / "store", *stages) == expected
