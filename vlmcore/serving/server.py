"""One model served on loopback for the length of a `with` block, as a real child process."""

from __future__ import annotations

import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmcore import proc
from vlmcore.errors import ServeError, VlmflowError
from vlmcore.recipe.schema import Serve
from vlmcore.serving import engines

log = logging.getLogger(__name__)

POLL_S = 0.1
HEALTH_TIMEOUT_S = 2.0
FIRST_ANSWER_TIMEOUT_S = 300.0  # the first request may compile
STOP_GRACE_S = 5.0  # with requests in flight vLLM takes minutes over a SIGTERM

# a proxy of the environment must not see requests to this machine
_http = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Endpoint:
    """A server that answers: `base_url` as OpenAI clients take it, `model_name` to be sent."""

    base_url: str
    model_name: str
    engine: engines.Engine
    started_in_s: float


@contextmanager
def serve(
    model_dir: Path,
    options: Serve,
    *,
    model_name: str,
    log_path: Path,
    preflight: Callable[[Path], None] | None = None,
) -> Iterator[Endpoint]:
    """Serve the HF checkpoint in `model_dir`; the endpoint has answered a request already.

    Args:
        model_dir: Folder with weights, config, tokenizer and processor.
        options: The recipe's `serve` section.
        model_name: Name of the model on the server; requests use `Endpoint.model_name`.
        log_path: File for the server's output.
        preflight: Called with `model_dir` first; raises when keys or shapes differ from the
            architecture's. Both engines start healthy on a checkpoint that lacks a tensor, and
            answer garbage.

    Raises:
        ServeError: The port is taken, or the server dies, is not ready in time, or answers for
            another model.
    """
    engine = engines.pick_engine(options.engine)
    model_dir = model_dir.resolve()
    if preflight is not None:
        preflight(model_dir)
    port = options.port or proc.free_port(options.host)
    _require_free(options.host, port)
    cmd = engines.command(engine, model_dir, options, model_name=model_name, port=port)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    env = engines.environment(engine)
    started = time.monotonic()
    with proc.child(cmd, log_path=log_path, env=env, grace_s=STOP_GRACE_S) as server:
        url = f"http://{proc.reachable(options.host)}:{port}"
        sent_name = engines.sent_name(engine, model_dir, model_name=model_name)
        _wait_until_healthy(server, url, timeout_s=options.startup_timeout_s)
        _require_answer(server, url, sent_name)
        endpoint = Endpoint(f"{url}/v1", sent_name, engine, time.monotonic() - started)
        log.info("%s serves %s after %.1f s", engine, model_dir, endpoint.started_in_s)
        try:
            yield endpoint
        except VlmflowError as error:
            if server.exit_code is not None:
                raise _died(server, "while it was in use") from error
            raise


def _require_free(host: str, port: int) -> None:
    if holder := proc.port_holder(host, port):
        raise ServeError(
            f"serve.port: cannot listen on {host}:{port} ({holder}). Stop it, or leave serve.port "
            "empty for a free port."
        )


def _wait_until_healthy(server: proc.Child, url: str, *, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not _is_healthy(url):
        if server.exit_code is not None:
            raise _died(server, "before it was ready")
        if time.monotonic() > deadline:
            raise ServeError(
                f"the model server was not ready after {timeout_s:g} s; raise "
                f"serve.startup_timeout_s if it needs longer (whole output: {server.log_path}). "
                f"Its last lines:\n{server.tail()}"
            )
        time.sleep(POLL_S)


def _is_healthy(url: str) -> bool:
    try:
        with _http.open(f"{url}/health", timeout=HEALTH_TIMEOUT_S) as response:
            return response.status == 200
    except OSError:  # refused, reset, timed out, or an HTTP error
        return False


def _require_answer(server: proc.Child, url: str, model_name: str) -> None:
    """Whoever took the port between our check and our start is healthy too: ask for our model.

    Not through `/v1/models`: transformers serve lists the hub's cache there, not its model.
    """
    body = {
        "model": model_name,
        "max_tokens": 1,
        "messages": [{"role": "user", "content": "Are you ready?"}],
    }
    try:
        answer = _post(f"{url}/v1/chat/completions", body)
    except urllib.error.HTTPError as error:
        found = f"HTTP {error.code}: {error.read(500).decode(errors='replace')}"
        raise ServeError(
            f"{url} does not answer for the model {model_name}: {found} "
            f"(output of the server that was started: {server.log_path})"
        ) from error
    except (OSError, ValueError) as error:
        raise ServeError(
            f"{url} gives no answer: {error}. Last lines of {server.log_path}:\n{server.tail()}"
        ) from error
    named = str(answer.get("model", "")).removesuffix("@main")  # transformers adds the revision
    if named != model_name:
        raise ServeError(f"{url} answers for the model {named!r}, expected {model_name!r}")
    if server.exit_code is not None:
        raise _died(server, f"while another one answers at {url}")


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with _http.open(request, timeout=FIRST_ANSWER_TIMEOUT_S) as response:
        return json.load(response)


def _died(server: proc.Child, when: str) -> ServeError:
    return ServeError(
        f"the model server ended with exit code {server.exit_code} {when} "
        f"(whole output: {server.log_path}); its last lines:\n{server.tail()}"
    )
