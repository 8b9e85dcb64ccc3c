import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vlmcore import proc

# A child whose grandchild moves to another session and ignores SIGTERM, as torchrun's ranks may.
STUBBORN = """
import os, signal, subprocess, sys, time
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
grandchild = subprocess.Popen([sys.executable, "-c", code, sys.argv[1]], start_new_session=True)
print("started", grandchild.pid, flush=True)
time.sleep(float(sys.argv[2]))
sys.exit(int(sys.argv[3]))
"""


def stubborn(marker: str, *, runs_s: float = 600, exit_code: int = 0) -> list[str]:
    return [sys.executable, "-c", STUBBORN, marker, str(runs_s), str(exit_code)]


def alive(marker: str) -> list[int]:
    found = []
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker in cmdline.read_text().split("\0"):
                found.append(int(cmdline.parent.name))
        except OSError:
            continue
    return found


def wait_until(condition, timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


@pytest.fixture
def marker(request: pytest.FixtureRequest):
    name = f"marker-{os.getpid()}-{request.node.name}"
    yield name
    for pid in alive(name):
        os.kill(pid, signal.SIGKILL)


def test_each_line_reaches_the_callback_and_the_log(tmp_path: Path) -> None:
    lines: list[str] = []
    code = "import sys; print('a'); print('b', file=sys.stderr); print('1%\\r2%')"
    proc.run_logged(
        [sys.executable, "-u", "-c", code], log_path=tmp_path / "log", on_line=lines.append
    )
    assert lines == ["a", "b", "1%", "2%"]
    assert (tmp_path / "log").read_text().split() == lines


def test_lines_come_while_the_child_still_runs() -> None:
    came: list[float] = []
    code = "import time; print('now'); time.sleep(1.5)"
    proc.run_logged([sys.executable, "-c", code], on_line=lambda _: came.append(time.monotonic()))
    assert time.monotonic() - came[0] > 1


def test_a_failure_carries_exit_code_and_last_lines() -> None:
    code = "import sys; [print('line', n) for n in range(100)]; sys.exit(3)"
    with pytest.raises(proc.ChildFailedError, match="exit code 3") as caught:
        proc.run_logged([sys.executable, "-c", code])
    assert caught.value.exit_code == 3
    assert caught.value.tail.splitlines() == [f"line {n}" for n in range(60, 100)]


def test_a_killed_child_is_said_to_be_killed() -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(proc.ChildFailedError, match="SIGKILL.*memory") as caught:
        proc.run_logged([sys.executable, "-c", code])
    assert caught.value.exit_code == 137


def test_a_command_that_does_not_exist_is_named() -> None:
    with pytest.raises(proc.ChildFailedError, match="no-such-command: No such file"):
        proc.run_logged(["no-such-command"])


def test_an_exception_stops_child_and_grandchild(marker: str) -> None:
    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        proc.run_logged(stubborn(marker), on_line=stop, grace_s=0.5)
    assert alive(marker) == []


@pytest.mark.parametrize("exit_code", [0, 1])
def test_a_child_that_ended_leaves_no_grandchild(marker: str, exit_code: int) -> None:
    try:
        proc.run_logged(stubborn(marker, runs_s=0.2, exit_code=exit_code), grace_s=0.5)
    except proc.ChildFailedError as error:
        assert error.exit_code == exit_code
    assert alive(marker) == []


def test_a_child_that_heeds_sigterm_may_clean_up(tmp_path: Path) -> None:
    code = (
        "import pathlib, signal, sys, time\n"
        "def clean(*_): time.sleep(0.5); pathlib.Path(sys.argv[1]).touch(); sys.exit()\n"
        "signal.signal(signal.SIGTERM, clean); print('ready'); time.sleep(600)"
    )

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        proc.run_logged([sys.executable, "-c", code, str(tmp_path / "cleaned")], on_line=stop)
    assert (tmp_path / "cleaned").exists()


def owner_of(marker: str) -> subprocess.Popen[bytes]:
    """A process that runs a stubborn child through `run_logged`."""
    code = f"from vlmcore import proc; proc.run_logged({stubborn(marker)!r}, grace_s=1)"
    return subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1])


def test_kill_9_of_the_owner_leaves_nothing_behind(marker: str) -> None:
    owner = owner_of(marker)
    wait_until(lambda: len(alive(marker)) == 3)  # leash, child, grandchild
    owner.kill()
    owner.wait()
    wait_until(lambda: not alive(marker))


def test_kill_9_of_the_leash_ends_the_child_and_is_reported(tmp_path: Path) -> None:
    lines: list[str] = []

    def kill_leash(line: str) -> None:
        lines.append(line)
        os.kill(int(line), signal.SIGKILL)

    code = "import os, time; print(os.getppid()); time.sleep(600)"
    with pytest.raises(proc.ChildFailedError):
        proc.run_logged([sys.executable, "-c", code], on_line=kill_leash)
    assert len(lines) == 1


def test_a_thread_that_starts_a_child_may_end_before_it(tmp_path: Path) -> None:
    """A death signal tied to the starting thread would kill the server of a Prefect task."""
    entered = []

    def start() -> None:
        block = proc.child([sys.executable, "-c", "import time; time.sleep(600)"], log_path=log)
        entered.append((block, block.__enter__()))

    log = tmp_path / "log"
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    block, running = entered[0]
    time.sleep(0.5)
    assert running.exit_code is None
    block.__exit__(None, None, None)
    assert running.exit_code is not None


def test_a_server_is_stopped_at_the_end_of_its_block(tmp_path: Path, marker: str) -> None:
    with proc.child(stubborn(marker), log_path=tmp_path / "log", grace_s=0.5) as running:
        wait_until(lambda: "started" in running.tail())
        assert running.exit_code is None
        assert len(alive(marker)) == 3
    assert alive(marker) == []


def test_reap_stops_children_of_other_threads(marker: str) -> None:
    failures: list[proc.ChildFailedError] = []

    def work() -> None:
        try:
            proc.run_logged(stubborn(marker), grace_s=0.5)
        except proc.ChildFailedError as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    with pytest.raises(KeyboardInterrupt), proc.reap():  # noqa: PT012
        thread.start()
        wait_until(lambda: len(alive(marker)) == 3)
        raise KeyboardInterrupt
    thread.join(timeout=10)
    assert alive(marker) == []
    assert failures[0].exit_code == 128 + signal.SIGTERM


def test_reap_leaves_a_child_from_before_its_block_alone(tmp_path: Path) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    with proc.child(sleep, log_path=tmp_path / "before") as server:
        with pytest.raises(KeyboardInterrupt), proc.reap(), proc.child(
            sleep, log_path=tmp_path / "within"
        ) as worker:  # fmt: skip
            raise KeyboardInterrupt
        assert worker.exit_code is not None
        with pytest.raises(subprocess.TimeoutExpired):
            server.popen.wait(timeout=1)
