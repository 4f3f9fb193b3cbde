"""What every long-running Consilium process shares: one instance per folder, logs as JSON lines, an end on signals,
health (grpc.health.v1) and metrics (Prometheus) on loopback."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import logging.handlers
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from common.errors import Problem, RunError
from common.files import write_atomically

_LOG_BYTES, _OLD_LOGS = 10_000_000, 5


@dataclass(frozen=True)
class Instance:
    """A service that runs in a folder."""

    name: str
    pid: int
    started: float  # seconds since 1970


@contextmanager
def only_instance(folder: Path, name: str) -> Iterator[Instance]:
    """Be the one `name` of `folder`. Raises RunError if there is another."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("a") as file:
        try:
            _lock(file)
        except BlockingIOError:
            other = running_instance(folder, name)
            what = f"{name} runs here already" + (f", as process {other.pid}" if other else "")
            raise RunError(str(Problem(str(folder), what, "stop that one first"))) from None
        instance = Instance(name, os.getpid(), time.time())
        write_atomically(folder / f"{name}.json", json.dumps(asdict(instance)).encode())
        yield instance


def _lock(file: IO[str]) -> None:
    """Take the lock. Raises BlockingIOError; one who only looks holds it for an instant."""
    for _ in range(5):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.05)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def running_instance(folder: Path, name: str) -> Instance | None:
    """The `name` that runs in `folder`, or None: the lock goes with its process, however that ended."""
    try:
        with (folder / f"{name}.lock").open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        pass
    except OSError:
        return None
    try:
        return Instance(**json.loads((folder / f"{name}.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def stop_instance(folder: Path, name: str, *, patience_s: float = 30.0) -> bool:
    """Ask the running `name` to end, and wait; False if none ran. Raises RunError if it does not end in time."""
    instance = running_instance(folder, name)
    if instance is None:
        return False
    with contextlib.suppress(ProcessLookupError):  # it is ending by itself
        os.kill(instance.pid, signal.SIGTERM)
    deadline = time.monotonic() + patience_s
    while running_instance(folder, name):
        if time.monotonic() > deadline:
            raise RunError(f"{name} (process {instance.pid}) did not end within {patience_s:g} s")
        time.sleep(0.05)
    return True


def stop_on_signals() -> threading.Event:
    """An event that SIGTERM and Ctrl-C set."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, event, and the fields given as `extra={"fields": {...}}`."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = getattr(record, "fields", {})
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **fields,
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def open_log(file: Path, *, name: str) -> logging.Logger:
    """A log of JSON lines in `file`, turned over at 10 MB, made when there is something to say."""
    file.parent.mkdir(parents=True, exist_ok=True)
    log = logging.Logger(f"consilium.{name}", logging.INFO)
    handler = logging.handlers.RotatingFileHandler(
        file, maxBytes=_LOG_BYTES, backupCount=_OLD_LOGS, delay=True, encoding="utf-8", errors="backslashreplace"
    )
    handler.setFormatter(JsonLines())
    log.addHandler(handler)
    return log


@contextmanager
def health(port: int | None, serving: threading.Event) -> Iterator[None]:
    """grpc.health.v1 on 127.0.0.1:`port`: SERVING while the event is set. Raises RunError if the port is taken."""
    if port is None:
        yield
        return
    import grpc
    from grpc_health.v1 import health as service
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    class Answer(service.HealthServicer):
        def Check(self, request: Any, context: Any) -> Any:
            states = health_pb2.HealthCheckResponse
            return states(status=states.SERVING if serving.is_set() else states.NOT_SERVING)

    server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])  # else a taken port is shared
    health_pb2_grpc.add_HealthServicer_to_server(Answer(), server)
    try:
        server.add_insecure_port(f"127.0.0.1:{port}")
    except RuntimeError:
        raise RunError(f"port {port} of 127.0.0.1, for health, is taken: choose another") from None
    server.start()
    try:
        yield
    finally:
        server.stop(0.5).wait()


@contextmanager
def metrics(port: int | None, collector: Any) -> Iterator[None]:
    """Prometheus metrics of `collector` on 127.0.0.1:`port`. Raises RunError if the port is taken."""
    if port is None:
        yield
        return
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry()
    registry.register(collector)
    try:
        server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError:
        raise RunError(f"port {port} of 127.0.0.1, for metrics, is taken: choose another") from None
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
