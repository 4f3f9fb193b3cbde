"""What long-running processes share: one of each in a folder, an orderly end, JSON logs, health, and their programs."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.core import GaugeMetricFamily

from common.children import Child, flower_environment
from common.errors import RunError
from common.service import health, metrics, only_instance, open_log, running_instance, stop_instance, stop_on_signals
from tests.conftest import soon

ROOT = Path(__file__).parent.parent
LOG = logging.getLogger("test")

_SERVICE = """
import sys, time
from pathlib import Path
from common.service import only_instance, stop_on_signals
stop = stop_on_signals()
with only_instance(Path(sys.argv[1]), "worker"):
    print("up", flush=True)
    if sys.argv[2] == "deaf":
        time.sleep(60)
    stop.wait()
"""

_PARENT = """
import logging, sys, time
from pathlib import Path
from common.children import Child
child = Child("program", ["sleep", "60"], Path(sys.argv[1]), {"PATH": "/bin:/usr/bin"})
child.tend(logging.getLogger())
print(child.pid, flush=True)
time.sleep(60)
"""


@contextmanager
def process(source: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A Python program and the first line that it says; killed at the end."""
    command = [sys.executable, "-c", source, *arguments]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    try:
        yield running, running.stdout.readline().strip()
    finally:
        running.kill()
        running.wait()
        running.stdout.close()


def alive(pid: int) -> bool:
    """Whether the process runs; one that ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def taken_port() -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


def free_port() -> int:
    with taken_port() as probe:
        port: int = probe.getsockname()[1]
        return port


# ---- one instance --------------------------------------------------------------------------------------------------


def test_a_second_instance_of_a_folder_is_refused(tmp_path: Path) -> None:
    with process(_SERVICE, str(tmp_path), "") as (first, _):
        told = running_instance(tmp_path, "worker")
        assert told is not None
        assert told.pid == first.pid
        what = rf"worker runs here already, as process {first.pid} -- stop that one first"
        with pytest.raises(RunError, match=what), only_instance(tmp_path, "worker"):
            pass
        with only_instance(tmp_path, "node"):  # another service of the folder is none of its business
            pass


def test_a_killed_instance_leaves_its_folder_free(tmp_path: Path) -> None:
    with process(_SERVICE, str(tmp_path), "") as (first, _):
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    assert running_instance(tmp_path, "worker") is None
    with only_instance(tmp_path, "worker") as instance:
        assert instance.pid == os.getpid()
        assert running_instance(tmp_path, "worker") == instance
    assert running_instance(tmp_path, "worker") is None
    assert running_instance(tmp_path / "nowhere", "worker") is None


def test_one_who_only_looks_does_not_keep_an_instance_out(tmp_path: Path) -> None:
    import fcntl

    tmp_path.joinpath("worker.lock").touch()
    looker = tmp_path.joinpath("worker.lock").open()
    fcntl.flock(looker, fcntl.LOCK_SH)  # as `running_instance` has it for an instant
    threading.Timer(0.08, looker.close).start()
    with only_instance(tmp_path, "worker") as instance:
        assert instance.name == "worker"


def test_stop_ends_it_and_waits_for_its_end(tmp_path: Path) -> None:
    with process(_SERVICE, str(tmp_path), "") as (running, _):
        assert stop_instance(tmp_path, "worker", patience_s=10.0)
        assert running.wait(10) == 0
    assert stop_instance(tmp_path, "worker") is False


def test_an_instance_that_does_not_end_is_said(tmp_path: Path) -> None:
    with process(_SERVICE, str(tmp_path), "deaf") as (running, _):
        with pytest.raises(RunError, match=rf"worker \(process {running.pid}\) did not end within 0.2 s"):
            stop_instance(tmp_path, "worker", patience_s=0.2)
        assert running.poll() is None


def test_a_wrong_process_number_is_no_crash(tmp_path: Path) -> None:
    """A new instance has the lock, and the file still names the one before, long gone."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    with only_instance(tmp_path, "worker"):
        (tmp_path / "worker.json").write_text(json.dumps({"name": "worker", "pid": gone.pid, "started": 0.0}))
        with pytest.raises(RunError, match="did not end"):
            stop_instance(tmp_path, "worker", patience_s=0.1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_set_the_event_and_do_not_kill(number: signal.Signals) -> None:
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)}
    try:
        stop = stop_on_signals()
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        assert stop.wait(5)
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


# ---- logs ----------------------------------------------------------------------------------------------------------


def test_a_log_is_one_json_object_a_line(tmp_path: Path) -> None:
    log = open_log(tmp_path / "log" / "lab.log", name="lab")
    assert not (tmp_path / "log" / "lab.log").exists()  # nothing was said
    log.info("site %s", "let in\nnow", extra={"fields": {"site": "alder", "file": Path("x"), "name": "\udcff ü"}})
    log.debug("not kept")
    try:
        raise ValueError("why")
    except ValueError:
        log.exception("failed")
    first, second = map(json.loads, (tmp_path / "log" / "lab.log").read_text(encoding="utf-8").splitlines())
    assert (first["level"], first["event"], first["site"], first["file"]) == ("info", "site let in\nnow", "alder", "x")
    assert first["name"].endswith(" ü")
    assert time.strptime(first["time"][:-5], "%Y-%m-%dT%H:%M:%S")
    assert first["time"][-5] == "."
    assert first["time"].endswith("Z")
    assert (second["level"], second["exception"].splitlines()[-1]) == ("error", "ValueError: why")


def test_a_log_is_turned_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.service._LOG_BYTES", 200)
    log = open_log(tmp_path / "lab.log", name="lab")
    for number in range(30):
        log.info("event %d", number)
    assert len(list(tmp_path.iterdir())) == 6
    assert all(json.loads(line) for file in tmp_path.iterdir() for line in file.read_text().splitlines())


# ---- health and metrics --------------------------------------------------------------------------------------------


def health_of(port: int) -> int:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        return int(answer.status)


def test_health_follows_the_service() -> None:
    port, serving = free_port(), threading.Event()
    states = health_pb2.HealthCheckResponse
    with health(port, serving):
        assert health_of(port) == states.NOT_SERVING
        serving.set()
        assert health_of(port) == states.SERVING
    with pytest.raises(grpc.RpcError):
        health_of(port)
    with health(None, serving):
        pass


def test_metrics_are_read_over_http() -> None:
    class Collector:
        def collect(self) -> Iterator[GaugeMetricFamily]:
            yield GaugeMetricFamily("consilium_x", "x", value=3.0)

    port = free_port()
    for _ in range(2):  # the port is free again at the end
        with metrics(port, Collector()), urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            assert "consilium_x 3.0" in answer.read().decode()
    with metrics(None, None):
        pass


@pytest.mark.parametrize("what", ["health", "metrics"])
def test_a_taken_port_is_said(what: str) -> None:
    with taken_port() as other:
        port = other.getsockname()[1]
        open_it = health(port, threading.Event()) if what == "health" else metrics(port, None)
        with pytest.raises(RunError, match=f"port {port} of 127.0.0.1, for {what}, is taken: choose another"), open_it:
            pass


def test_two_services_do_not_share_a_health_port() -> None:
    """gRPC would let them, and each second probe would hear the other one."""
    port, serving = free_port(), threading.Event()
    with health(port, serving), pytest.raises(RunError, match="is taken"), health(port, serving):
        pass


# ---- programs ------------------------------------------------------------------------------------------------------


def shell(folder: Path, script: str, *, restart_s: float = 0.0) -> Child:
    return Child("program", ["sh", "-c", script], folder, {"PATH": os.environ["PATH"]}, restart_s=restart_s)


def test_a_program_that_ends_is_started_again_after_its_pause(tmp_path: Path) -> None:
    child = shell(tmp_path, "echo up", restart_s=0.3)
    child.tend(LOG)
    assert soon(lambda: not child.running)
    child.tend(LOG)  # notes the end
    child.tend(LOG)
    assert child.starts == 1
    begun = time.monotonic()
    while child.starts < 2:
        assert time.monotonic() - begun < 10
        child.tend(LOG)
        time.sleep(0.01)
    assert time.monotonic() - begun > 0.2
    child.stop()
    assert (tmp_path / "program.log").read_text().startswith("up\n")


def test_a_program_that_runs_is_left_alone(tmp_path: Path) -> None:
    child = shell(tmp_path, "exec sleep 60")
    for _ in range(3):
        child.tend(LOG)
    assert (child.starts, child.running) == (1, True)
    pid = child.pid
    assert pid is not None
    child.stop()
    assert not alive(pid)
    assert (child.running, child.pid) == (False, None)
    child.stop()  # nothing is left to stop


def test_what_a_program_started_ends_with_it(tmp_path: Path) -> None:
    """Also one that does not listen, and also when the program died and left it behind."""
    script = "sh -c 'trap \"\" TERM; echo $$ > deaf; while :; do sleep 0.1; done' & {}"
    for end in ("wait", "while [ ! -s deaf ]; do sleep 0.01; done; exit 1"):
        child = shell(tmp_path, script.format(end), restart_s=60.0)
        child.tend(LOG)
        assert soon(lambda: (tmp_path / "deaf").exists() and (tmp_path / "deaf").read_text().strip() != "")
        deaf = int((tmp_path / "deaf").read_text())
        if end == "wait":
            child.stop(patience_s=0.2)
        else:
            assert soon(lambda child=child: not child.running)  # type: ignore[misc]
            child.tend(LOG)
        assert soon(lambda deaf=deaf: not alive(deaf))  # type: ignore[misc]
        (tmp_path / "deaf").unlink()


def test_programs_die_with_a_service_that_is_killed(tmp_path: Path) -> None:
    with process(_PARENT, str(tmp_path)) as (parent, said):
        child = int(said)
        assert alive(child)
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        assert soon(lambda: not alive(child))


def test_a_signal_to_the_terminals_group_does_not_reach_programs(tmp_path: Path) -> None:
    """Ctrl-C is for the service, which ends them in order."""
    child = shell(tmp_path, "exec sleep 60")
    child.tend(LOG)
    assert child.pid is not None
    assert os.getpgid(child.pid) == child.pid != os.getpgrp()
    child.stop()


def test_a_flower_program_has_a_home_of_its_own(tmp_path: Path) -> None:
    environment = flower_environment(tmp_path)
    assert environment["FLWR_HOME"] == str(tmp_path)
    assert environment["PYTHONSAFEPATH"] == "1"
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
