"""The deployments, and `vlmflow up` with a real server, a real worker and real runs."""

import importlib
import inspect
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.pipeline import plan, stages_to_offer
from flows.request import make_request
from flows.up import DEPLOYMENTS, PREFECT_FILE, WORK_POOL
from tasks.caching import matches
from vlmcore.proc import free_port
from vlmcore.recipe import list_recipes

DEPLOYED = yaml.safe_load(PREFECT_FILE.read_text())["deployments"]
SMALL = [
    "data.numbers.options.train=40",
    "data.numbers.options.val=8",
    "data.numbers.options.test=8",
]
LONG_TRAINING = [*SMALL, "train.teach.train_iters=100000"]


def test_the_deployments_are_the_flow_that_exists_with_parameters_that_it_takes() -> None:
    assert [f"build_vlm/{found['name']}" for found in DEPLOYED] == list(DEPLOYMENTS)
    for found in DEPLOYED:
        module, _, name = found["entrypoint"].rpartition(".")
        flow = getattr(importlib.import_module(module), name)
        flow.validate_parameters(found.get("parameters", {}))
        assert found["work_pool"]["name"] == WORK_POOL


def test_the_schedule_is_inactive_and_names_its_timezone() -> None:
    (schedule,) = DEPLOYED[1]["schedules"]
    assert schedule["active"] is False
    assert {"cron", "timezone", "slug"} <= schedule.keys()


def test_every_stage_that_the_form_offers_is_a_stage_of_some_recipe(tmp_path: Path) -> None:
    stages = [
        outcome.name
        for path in list_recipes()
        for outcome in plan(make_request(str(path), store=tmp_path))[0].outcomes
    ]
    offered = stages_to_offer()
    assert [name for name in offered if not any(matches(s, name) for s in stages)] == []
    assert [s for s in stages if not any(matches(s, name) for name in offered)] == []


def test_the_form_shows_help_and_a_menu_of_recipes_and_stages() -> None:
    from flows.build_vlm import build_vlm

    fields = build_vlm.parameters.properties
    assert fields["recipe"]["enum"] == [path.stem for path in list_recipes()]
    assert fields["refresh"]["items"]["enum"] == list(stages_to_offer())
    assert [name for name, field in fields.items() if not field.get("description")] == []
    assert list(fields) == list(inspect.signature(build_vlm.fn).parameters)


def test_up_names_who_holds_a_busy_port(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        done = subprocess.run(
            [*VLMFLOW, "up", "--port", str(port)], cwd=tmp_path, capture_output=True, text=True
        )
    assert done.returncode == 2
    assert re.search(rf"127.0.0.1:{port}: .*process {os.getpid()} .*--port", done.stderr, re.S)


@pytest.mark.slow
def test_up_serves_runs_of_the_deployments_and_leaves_no_process(tmp_path: Path) -> None:
    with vlmflow_up(tmp_path) as api:
        build, retrain = (api.ask(f"deployments/name/{name}") for name in DEPLOYMENTS)
        assert build["schedules"] == []
        assert [schedule["active"] for schedule in retrain["schedules"]] == [False]

        wanted = {"overrides": SMALL, "until": "data.numbers.shards"}
        first = api.run_to_the_end(build, wanted)
        assert first["state"]["type"] == "COMPLETED", first["state"]
        assert states_of_tasks(api, first) == {
            "data.numbers.raw": "Completed",
            "data.spelling.raw": "Completed",
            "data.numbers.shards": "Completed",
        }
        assert stages_in(tmp_path / ".vlmflow" / "store") == set(states_of_tasks(api, first))

        # the other deployment is the same flow over the same store
        again = api.run_to_the_end(retrain, wanted)
        assert set(states_of_tasks(api, again).values()) == {"Cached"}

        failed = api.run_to_the_end(build, {"until": "data.nubmers"})
        assert failed["state"]["type"] == "FAILED"
        assert "no stage is named 'data.nubmers'" in failed["state"]["message"]

        # switched on by somebody, the schedule outlives a restart
        schedule = retrain["schedules"][0]["id"]
        path = f"deployments/{retrain['id']}/schedules/{schedule}"
        api.ask(path, method="PATCH", body={"active": True})
    assert processes_in(tmp_path) == []

    with vlmflow_up(tmp_path) as api:
        retrain = api.ask(f"deployments/name/{DEPLOYMENTS[1]}")
        assert [schedule["active"] for schedule in retrain["schedules"]] == [True]
    assert processes_in(tmp_path) == []


@pytest.mark.slow
def test_a_run_cancelled_while_it_trains_leaves_no_process(tmp_path: Path) -> None:
    with vlmflow_up(tmp_path) as api:
        idle = set(processes_in(tmp_path))
        build = api.ask(f"deployments/name/{DEPLOYMENTS[0]}")
        run = api.start(build, {"overrides": LONG_TRAINING, "until": "train.teach"})
        log = tmp_path / ".vlmflow" / "logs"
        wait_until(lambda: any("step" in t.read_text() for t in log.glob("*/train.teach.log")))
        assert len(processes_in(tmp_path)) >= len(idle) + 4  # flow, leash, torchrun, ranks
        api.ask(
            f"flow_runs/{run['id']}/set_state",
            method="POST",
            body={"state": {"type": "CANCELLING", "name": "Cancelling"}},
        )
        wait_until(lambda: api.state_of(run) == "CANCELLED", timeout_s=60)
        wait_until(lambda: set(processes_in(tmp_path)) <= idle, timeout_s=30)


@pytest.mark.slow
def test_a_killed_up_takes_its_runs_along_and_the_next_one_is_free_to_run(tmp_path: Path) -> None:
    with vlmflow_up(tmp_path, ends_by=signal.SIGKILL) as api:
        build = api.ask(f"deployments/name/{DEPLOYMENTS[0]}")
        killed = api.start(build, {"until": "data.numbers.shards"})
        wait_until(lambda: api.state_of(killed) == "RUNNING")
    wait_until(lambda: processes_in(tmp_path) == [], timeout_s=60)
    with vlmflow_up(tmp_path) as api:
        assert api.state_of(killed) == "CRASHED"
        again = api.run_to_the_end(build, {"overrides": SMALL, "until": "data.numbers.raw"})
        assert again["state"]["type"] == "COMPLETED", again["state"]


VLMFLOW = (sys.executable, "-m", "flows")
BUSY_TRIES = 10  # Prefect says so while SQLite is locked; its own client asks again, too


class Api:
    """Prefect's REST API at `url`."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, *, method: str = "GET", body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            f"{self.url}/{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
            method=method,
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        tries = 0
        while True:
            try:
                with opener.open(request, timeout=30) as response:
                    return json.loads(response.read() or "null")
            except urllib.error.HTTPError as error:
                tries += 1
                if error.code != HTTPStatus.SERVICE_UNAVAILABLE or tries == BUSY_TRIES:
                    raise
            time.sleep(1)

    def start(self, deployment: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
        path = f"deployments/{deployment['id']}/create_flow_run"
        return self.ask(path, method="POST", body={"parameters": parameters})

    def state_of(self, run: dict[str, Any]) -> str:
        return self.ask(f"flow_runs/{run['id']}")["state"]["type"]

    def run_to_the_end(
        self, deployment: dict[str, Any], parameters: dict[str, Any]
    ) -> dict[str, Any]:
        run = self.start(deployment, parameters)
        ended = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
        wait_until(lambda: self.state_of(run) in ended)
        return self.ask(f"flow_runs/{run['id']}")


@contextmanager
def vlmflow_up(folder: Path, *, ends_by: int = signal.SIGINT) -> Iterator[Api]:
    """`vlmflow up` in `folder`, ended as Ctrl-C does it, or by another signal."""
    port = free_port()
    out = folder / "up.out"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT", "VLMFLOW"))}
    with out.open("w") as file:
        popen = subprocess.Popen(
            [*VLMFLOW, "up", "--port", str(port)],
            cwd=folder,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            # tests that a shell runs in the background inherit that Ctrl-C is ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    try:
        wait_until(lambda: "Ctrl-C" in out.read_text() or popen.poll() is not None)
        assert popen.poll() is None, out.read_text()
        yield Api(f"http://127.0.0.1:{port}/api")
        popen.send_signal(ends_by)
        assert popen.wait(60) == (0 if ends_by == signal.SIGINT else -ends_by), out.read_text()
    finally:
        popen.kill()
        popen.wait()


def states_of_tasks(api: Api, run: dict[str, Any]) -> dict[str, str]:
    body = {"flow_runs": {"id": {"any_": [run["id"]]}}}
    found = api.ask("task_runs/filter", method="POST", body=body)
    return {task["name"]: task["state_name"] for task in found}


def stages_in(store: Path) -> set[str]:
    from vlmcore.artifacts import Store

    return {record.stage for record in Store(store).artifacts()}


def processes_in(folder: Path) -> list[int]:
    """Processes that work in `folder`, or were given it in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            here = (process / "cwd").readlink() == folder
            if here or f"{folder}/".encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
        except OSError:  # it ended, or is another user's
            continue
    return sorted(set(found) - {os.getpid()})


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 180) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.2)
