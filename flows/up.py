"""`vlmflow up`: a Prefect server, a worker and the deployments, for as long as a command runs.

Everything of Prefect's lives in `.vlmflow/prefect` beside the store. The user's own `~/.prefect`
stays as it is: its profile may name another server, its database may be another version's, and two
checkouts must not run each other's deployments.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from flows.request import default_store
from vlmcore import compat, proc
from vlmcore.errors import ServeError

log = logging.getLogger(__name__)

PREFECT = (sys.executable, "-m", "prefect")
PREFECT_FILE = Path(__file__).parents[1] / "deployments" / "prefect.yaml"
WORK_POOL = "vlmflow"
DEPLOYMENTS = ("build_vlm/build_vlm", "build_vlm/retrain")
STARTUP_TIMEOUT_S = 180.0  # about 10 s on two idle cores
POLL_S = 0.2
HTTP_TIMEOUT_S = 10.0
STOP_GRACE_S = 30.0  # a training run under the worker takes up to 20 s of it

# a proxy of the environment must not see requests to this machine
_http = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Instance:
    """A server with its worker; `deployments` as Prefect's API gives them."""

    url: str
    store: Path
    log_dir: Path
    deployments: list[dict[str, Any]]
    children: tuple[proc.Child, ...]

    @property
    def api_url(self) -> str:
        """What PREFECT_API_URL is set to."""
        return f"{self.url}/api"

    def wait(self) -> None:
        """Waits until the server or the worker ends.

        Raises:
            ServeError: One of them did.
        """
        while True:
            for child in self.children:
                _require_alive(child)
            time.sleep(POLL_S)


@contextmanager
def up(*, host: str, port: int) -> Iterator[Instance]:
    """A Prefect server, a worker and the deployments of prefect.yaml for a `with` block.

    Args:
        host: Address to listen on.
        port: Port of the UI and the API.

    Raises:
        ServeError: The port is taken, or the server or the worker does not come up.
        ChildFailedError: The deployments cannot be applied.
    """
    if holder := proc.port_holder(host, port):
        raise ServeError(
            f"cannot listen on {host}:{port}: {holder}. Stop it, or choose another port with "
            "`vlmflow up --port`."
        )
    url = f"http://{proc.reachable(host)}:{port}"
    home, logs = Path(".vlmflow/prefect").resolve(), Path(".vlmflow/logs").resolve()
    log_dir = logs / f"{datetime.now():%Y%m%d-%H%M%S}-up-{os.getpid()}"
    for folder in (home, log_dir):
        folder.mkdir(parents=True, exist_ok=True)
    store = default_store().resolve()
    env = _environment(f"{url}/api", home=home, store=store)
    server_cmd = [*PREFECT, "server", "start", "--host", host, "--port", str(port)]
    worker_cmd = [*PREFECT, "worker", "start", "--pool", WORK_POOL, "--type", "process"]
    with proc.child(server_cmd, log_path=log_dir / "server.log", env=env) as server:
        _wait_for(f"{url}/api/health", server)
        _end_dead_runs(f"{url}/api")
        with proc.child(
            worker_cmd, log_path=log_dir / "worker.log", env=env, grace_s=STOP_GRACE_S
        ) as worker:
            _wait_for(f"{url}/api/work_pools/{WORK_POOL}", worker)  # the worker makes its pool
            _deploy(f"{url}/api", env=env, log_path=log_dir / "deploy.log")
            deployments = [_deployment(f"{url}/api", name) for name in DEPLOYMENTS]
            yield Instance(url, store, log_dir, deployments, (server, worker))


@contextmanager
def private_server(*, home: Path, log_dir: Path) -> Iterator[str]:
    """A Prefect server for one run of the command line; gives its API's address.

    Prefect's own temporary server would outlive a killed run; this one ends with its owner.

    Args:
        home: Folder of its database, `$PREFECT_HOME` where that is set.
        log_dir: Where its output goes.

    Raises:
        ServeError: It does not come up.
    """
    home = Path(os.environ.get("PREFECT_HOME") or home).resolve()
    for folder in (home, log_dir):
        folder.mkdir(parents=True, exist_ok=True)
    port = proc.free_port()
    url = f"http://127.0.0.1:{port}/api"
    env = _environment(url, home=home, store=default_store().resolve())
    where = ["--host", "127.0.0.1", "--port", str(port)]
    server_cmd = [*PREFECT, "server", "start", "--no-services", *where]
    with proc.child(server_cmd, log_path=log_dir / "server.log", env=env) as server:
        _wait_for(f"{url}/health", server)
        yield url


def _environment(api_url: str, *, home: Path, store: Path) -> dict[str, str]:
    return compat.child_env(
        {
            **os.environ,
            "PREFECT_HOME": str(home),
            "PREFECT_API_URL": api_url,
            "PREFECT_SERVER_UI_API_URL": "/api",  # where the page came from, not port 4200
            "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
            # nothing leaves this machine
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "PREFECT_WORKER_QUERY_SECONDS": "2",  # 10 unless told; somebody waits at the UI
            "VLMFLOW_STORE": str(store),
        }
    )


def _end_dead_runs(api_url: str) -> None:
    """Marks the runs of a worker that was killed: they would hold the deployment's one slot."""
    wanted = {
        "flow_runs": {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}},
        "work_pools": {"name": {"any_": [WORK_POOL]}},
    }
    crashed = {
        "type": "CRASHED",
        "name": "Crashed",
        "message": "vlmflow up was killed. Retry this run: it goes on where it stopped.",
    }
    for run in _ask(f"{api_url}/flow_runs/filter", method="POST", body=wanted):
        path = f"{api_url}/flow_runs/{run['id']}/set_state"
        _ask(path, method="POST", body={"state": crashed, "force": True})


def _deploy(api_url: str, *, env: dict[str, str], log_path: Path) -> None:
    """Applies prefect.yaml; a schedule that somebody switched on stays on."""
    switched_on = [
        (found["id"], schedule["id"])
        for found in (_deployment(api_url, name) for name in DEPLOYMENTS)
        for schedule in found.get("schedules", [])
        if schedule["active"]
    ]
    deploy = [*PREFECT, "--no-prompt", "deploy", "--all", "--prefect-file", str(PREFECT_FILE)]
    proc.run_logged(deploy, log_path=log_path, env=env)
    for deployment, schedule in switched_on:
        path = f"{api_url}/deployments/{deployment}/schedules/{schedule}"
        _ask(path, method="PATCH", body={"active": True})


def _deployment(api_url: str, name: str) -> dict[str, Any]:
    """A deployment as the server knows it; empty before the first time."""
    try:
        return _ask(f"{api_url}/deployments/name/{name}")
    except urllib.error.HTTPError as error:
        if error.code != 404:
            raise
        return {}


def _ask(url: str, *, method: str = "GET", body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    with _http.open(request, timeout=HTTP_TIMEOUT_S) as response:
        return json.loads(response.read() or "null")


def _wait_for(url: str, child: proc.Child) -> None:
    """Waits until `url` answers, as long as `child` runs."""
    deadline = time.monotonic() + STARTUP_TIMEOUT_S
    while True:
        _require_alive(child)
        try:
            _ask(url)
        except OSError:  # refused, timed out, or an HTTP error
            if time.monotonic() > deadline:
                raise ServeError(
                    f"no answer from {url} after {STARTUP_TIMEOUT_S:g} s "
                    f"(whole output: {child.log_path}); its last lines:\n{child.tail()}"
                ) from None
            time.sleep(POLL_S)
        else:
            return


def _require_alive(child: proc.Child) -> None:
    if child.exit_code is not None:
        raise ServeError(
            f"the Prefect {child.log_path.stem} ended with exit code {child.exit_code} "
            f"(whole output: {child.log_path}); its last lines:\n{child.tail()}"
        )


def screen(instance: Instance) -> str:
    """What a person can do now, and where to look."""
    build, retrain = instance.deployments
    schedule = retrain["schedules"][0]
    switch = "pause" if schedule["active"] else "resume"
    page = f"{instance.url}/deployments/deployment"
    return f"""\
UI           {instance.url}
deployments  {build["name"]}  when asked: {page}/{build["id"]}/run
             {retrain["name"]}    {_when(schedule)}: {page}/{retrain["id"]}

in another shell
  export PREFECT_API_URL={instance.api_url}
  vlmflow run RECIPE                                                # runs there, reports here
  prefect deployment run build_vlm/build_vlm -p recipe=RECIPE       # runs here
  prefect deployment schedule {switch} build_vlm/retrain {schedule["id"]}

store        {instance.store}
logs         {instance.log_dir}
Ctrl-C stops the server, the worker and its runs; a run that is started again goes on."""


def _when(schedule: dict[str, Any]) -> str:
    rule = schedule["schedule"]
    return f"{rule['cron']} {rule['timezone']}, {'on' if schedule['active'] else 'off'}"
