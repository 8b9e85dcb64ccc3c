import json
from pathlib import Path

import pytest
from PIL import Image

from vlmcore import proc
from vlmcore.errors import EvaluationError
from vlmcore.evaluation.score import read_records, score
from vlmcore.serving import Endpoint


def write_records(folder: Path, *rows: dict[str, str]) -> Path:
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(id: str, image: str = "image.png") -> dict[str, str]:
    return {"id": id, "image": image, "question": "Read the number.", "answer": "7"}


def test_every_unusable_record_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    broken = row("c")
    del broken["answer"]
    path = write_records(tmp_path, row("a"), row("a"), row("b", "gone.png"), broken)
    with pytest.raises(EvaluationError) as caught:
        read_records(path)
    message = str(caught.value)
    assert "line 2: the id 'a' stands above" in message
    assert "line 3: no image" in message and "gone.png" in message
    assert "line 4: Field required ('answer',)" in message


def test_an_empty_benchmark_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="it is empty"):
        read_records(write_records(tmp_path))


@pytest.mark.slow
def test_a_dead_server_gives_an_error_and_no_score(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "image.png")
    nobody = Endpoint(f"http://127.0.0.1:{proc.free_port()}/v1", "model", "vllm", 0.0)
    with pytest.raises(EvaluationError, match="no score from http://127.0.0.1:.*onnection"):
        score(
            nobody,
            benchmark="holdout",
            records=write_records(tmp_path, row("a"), row("b")),
            work_dir=tmp_path / "work",
            max_tokens=4,
            concurrency=2,
        )
    assert not (tmp_path / "work" / "predictions.jsonl").exists()
