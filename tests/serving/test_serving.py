import importlib.util
import json
import os
import shutil
import socket
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from PIL import Image

from tests.tiny import serving_model
from vlmcore import compat
from vlmcore.errors import EvaluationError, ServeError, WeightError
from vlmcore.evaluation.score import score
from vlmcore.recipe.schema import Serve
from vlmcore.serving import serve

OPTIONS = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": True}
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM here")
ENGINES = [pytest.param("vllm", marks=needs_vllm), "transformers"]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compat.install()
    return serving_model.build(tmp_path_factory.mktemp("tiny-qwen3-vl"))


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Twelve images of four sizes; all answers wrong, until the model's own are put in."""
    rows = []
    for n in range(12):
        image = f"{n}.png"
        Image.new("RGB", (32 * (1 + n % 4), 32), (20 * n, 80, 160)).save(tmp_path / image)
        rows.append({"id": f"r{n}", "image": image, "question": "Read the number.", "answer": "7"})
    return write(tmp_path / "records.jsonl", rows)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def processes_with(text: str) -> list[int]:
    found = []
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text in cmdline.read_text() and cmdline.parent.name != str(os.getpid()):
                found.append(int(cmdline.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_is_served_scored_and_gone(
    model_dir: Path, records: Path, tmp_path: Path, engine: str
) -> None:
    options = Serve(engine=engine, **OPTIONS)
    scoring = {"benchmark": "holdout", "max_tokens": 4, "concurrency": 4}
    log_path = tmp_path / "server.log"
    with serve(model_dir, options, model_name="tiny@0a1b", log_path=log_path) as endpoint:
        assert endpoint.engine == engine
        wrong = score(endpoint, records=records, work_dir=tmp_path / "1", **scoring)
        # now the answers that the model gave are the right ones for 3 of 4 images
        rows = read(wrong.predictions)
        corrected = [
            {key: row[key] for key in ("id", "image", "question")}
            | {"answer": row["prediction"] if n % 4 else "7"}
            for n, row in enumerate(rows)
        ]
        write(records, corrected)
        right = score(endpoint, records=records, work_dir=tmp_path / "2", **scoring)
    assert wrong.metrics == {"exact_match": 0.0}
    assert [row["id"] for row in rows] == [f"r{n}" for n in range(12)]
    assert right.metrics == {"exact_match": 0.75}
    assert [row["correct"] for row in read(right.predictions)] == [n % 4 != 0 for n in range(12)]
    assert right.num_samples == 12
    assert processes_with(str(model_dir)) == []
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(endpoint.base_url)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_that_cannot_load_is_an_error_with_the_servers_words(
    model_dir: Path, tmp_path: Path, engine: str
) -> None:
    broken = Path(shutil.copytree(model_dir, tmp_path / "broken"))
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "no-such-model"}))
    options = Serve(engine=engine, **OPTIONS)
    with (
        pytest.raises(ServeError, match=r"(?s)exit code 1 before it was ready.*no-such-model"),
        serve(broken, options, model_name="broken", log_path=tmp_path / "log"),
    ):
        pytest.fail("it was served")


@pytest.mark.slow
def test_a_server_that_dies_during_scoring_is_the_error(
    model_dir: Path, records: Path, tmp_path: Path
) -> None:
    options = Serve(engine="transformers", **OPTIONS)
    with (
        pytest.raises(ServeError, match="while it was in use") as caught,
        serve(model_dir, options, model_name="tiny", log_path=tmp_path / "log") as endpoint,
    ):
        for pid in processes_with(str(model_dir)):
            if "leash" not in Path(f"/proc/{pid}/cmdline").read_text():
                os.kill(pid, 9)
        score(
            endpoint,
            benchmark="holdout",
            records=records,
            work_dir=tmp_path / "work",
            max_tokens=4,
            concurrency=4,
        )
    assert isinstance(caught.value.__cause__, EvaluationError)


@pytest.mark.slow
def test_a_server_that_is_too_slow_is_stopped(model_dir: Path, tmp_path: Path) -> None:
    options = Serve(engine="transformers", startup_timeout_s=0.5, **OPTIONS)
    with (
        pytest.raises(ServeError, match="serve.startup_timeout_s"),
        serve(model_dir, options, model_name="tiny", log_path=tmp_path / "log"),
    ):
        pytest.fail("it was served")
    assert processes_with(str(model_dir)) == []


def test_a_busy_port_is_named_with_who_holds_it(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        options = Serve(engine="transformers", port=port)
        with (
            pytest.raises(ServeError, match=rf"127.0.0.1:{port} .*process {os.getpid()} .*free"),
            serve(tmp_path, options, model_name="tiny", log_path=tmp_path / "log"),
        ):
            pytest.fail("it was served")


def test_a_checkpoint_that_fails_the_preflight_is_not_served(tmp_path: Path) -> None:
    def refuse(model_dir: Path) -> None:
        raise WeightError(f"{model_dir}: a key is missing")

    with (
        pytest.raises(WeightError, match="a key is missing"),
        serve(
            tmp_path,
            Serve(engine="transformers"),
            model_name="tiny",
            log_path=tmp_path / "log",
            preflight=refuse,
        ),
    ):
        pytest.fail("it was served")
    assert not (tmp_path / "log").exists()


class OtherModel(BaseHTTPRequestHandler):
    """A healthy server that serves another model, and says nothing about it at /health."""

    def do_GET(self) -> None:  # noqa: N802
        self._answer(200, {})

    def do_POST(self) -> None:  # noqa: N802
        self._answer(404, {"error": "The model `tiny` does not exist."})

    def _answer(self, status: int, body: dict) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args: object) -> None:
        pass


def test_a_healthy_server_of_another_model_is_not_taken_for_ours(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody took the port after we found it free."""
    other = HTTPServer(("127.0.0.1", 0), OtherModel)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    monkeypatch.setattr("vlmcore.serving.server._require_free", lambda host, port: None)
    options = Serve(engine="transformers", port=other.server_port, **OPTIONS)
    try:
        with (
            pytest.raises(ServeError, match="does not answer for the model .* HTTP 404"),
            serve(model_dir, options, model_name="tiny", log_path=tmp_path / "log"),
        ):
            pytest.fail("it was served")
    finally:
        other.shutdown()
