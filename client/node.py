"""The two processes of a hospital: the worker, which has the data and no network, and the node, which has the network
and no data. `consilium-site start` runs both; under systemd each is a unit of its own user."""

from __future__ import annotations

import json
import logging
import os
import resource
import secrets
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from client.installation import require_verified
from client.membership import NODE, NODE_KEY, membership_of
from client.site import SiteConfig, load_site_config
from client.wall import SOCKET, WorkerProxy, serving, users_allowed
from common.children import Child, flower_environment, stop_all
from common.errors import Problem, UsageError, WorkerUnavailable
from common.files import write_atomically
from common.keys import objection_to_private, write_private
from common.service import health, metrics, only_instance, open_log, running_instance

WORKER, NODE_SERVICE = "worker", "node"

_SECRET = "app.secret"  # between the SuperNode and the app: who may take its messages

_TICK_S = 0.2
_NODE_RESTART_S = 15.0  # Flower turns a node away that comes back within its last heartbeat


def run_worker(folder: Path, stop: threading.Event) -> None:
    """Be the worker of the site in `folder` until `stop` is set.

    Raises UsageError if the installed files were changed or the site joined no lab, RunError if there is a worker.
    """
    config = load_site_config(folder)
    if config.verified_install and not config.phantom:
        require_verified()
    membership_of(folder)
    _limit(config)
    state = folder / config.state
    with only_instance(state, WORKER):
        from client.worker import Worker  # torch: only once everything else is right

        log = open_log(state / "log" / "worker.log", name="worker")
        worker = Worker(folder, state=state)
        with serving(worker, folder / SOCKET, users=users_allowed(config.node_user)):
            log.info("worker ready", extra={"fields": {"site": config.name}})
            stop.wait()
        log.info("worker stopped", extra={"fields": {"site": config.name}})


@dataclass(eq=False)
class NodeStanding:
    """What the node knows of itself; for health and metrics."""

    folder: Path
    children: list[Child] = field(default_factory=list)
    ready: threading.Event = field(default_factory=threading.Event)  # the node runs and its worker answers

    def collect(self) -> Iterator[object]:
        """As Prometheus wants it; the worker itself has no network."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        starts = CounterMetricFamily("consilium_program_starts", "Starts of programs", labels=["program"])
        for child in self.children:
            starts.add_metric([child.name], child.starts)
        yield starts
        yield GaugeMetricFamily("consilium_node_ready", "1 if node and worker run", value=float(self.ready.is_set()))
        try:
            status = WorkerProxy(self.folder / SOCKET).status()
        except WorkerUnavailable:
            return
        yield GaugeMetricFamily("consilium_epsilon_spent", "Of the ledger", value=float(status["epsilon_spent"]))
        yield GaugeMetricFamily("consilium_epsilon_budget", "Of a patient", value=float(status["epsilon_budget"]))
        yield GaugeMetricFamily("consilium_rounds_charged", "Rows of the ledger", value=float(status["rounds_charged"]))
        yield GaugeMetricFamily("consilium_studies_pending", "Wait for approval", value=len(status["pending"]))


def run_node(folder: Path, stop: threading.Event, *, with_worker: bool) -> None:
    """Be the node of the site in `folder`, and keep its programs running, until `stop` is set.

    With `with_worker` the worker is one of them; else it is started apart, as another user.
    Raises UsageError if the site joined no lab or its key is open to others, RunError if there is a node.
    """
    config, membership = load_site_config(folder), membership_of(folder)
    node = folder / NODE
    if objection := objection_to_private(node / NODE_KEY):
        raise UsageError(objection)
    with ExitStack() as stack:
        stack.enter_context(only_instance(node, NODE_SERVICE))
        log = open_log(node / "log" / "node.log", name="node")
        standing = NodeStanding(folder)
        write_atomically(node / "ca.crt", membership.authority.encode())
        if with_worker:
            standing.children.append(_worker_child(folder, config))
        standing.children += _flower_programs(folder, membership.address)
        stack.enter_context(health(config.health_port, standing.ready))
        stack.enter_context(metrics(config.metrics_port, standing))
        stack.callback(stop_all, standing.children)
        log.info("node started", extra={"fields": {"site": config.name, "lab": membership.address}})
        _tend(standing, stop, log)
        log.info("node stopped", extra={"fields": {"site": config.name}})


def site_status(folder: Path) -> dict[str, Any]:
    """What runs at the site and what stands there; `worker` is what it says itself, None if it does not answer."""
    config = load_site_config(folder)
    try:
        membership = membership_of(folder)
    except UsageError:
        membership = None
    node = running_instance(folder / NODE, NODE_SERVICE)
    try:
        worker: dict[str, Any] | None = dict(WorkerProxy(folder / SOCKET).status())
    except WorkerUnavailable:
        worker = None
    return {
        "site": config.name,
        "lab": membership.lab if membership else None,
        "address": membership.address if membership else None,
        "node": asdict(node) if node else None,
        "worker": worker,
    }


def _tend(standing: NodeStanding, stop: threading.Event, log: logging.Logger) -> None:
    worker, ticks = WorkerProxy(standing.folder / SOCKET), 0
    while not stop.wait(_TICK_S):
        for child in standing.children:
            child.tend(log)
        if ticks % 10 == 0:
            try:
                worker.hello()
                answers = True
            except WorkerUnavailable:
                answers = False
            if answers and all(child.running for child in standing.children):
                standing.ready.set()
            else:
                standing.ready.clear()
        ticks += 1


def _flower_programs(folder: Path, address: str) -> list[Child]:
    """The SuperNode and the process that answers its messages: each is started again if it is killed."""
    node, environment = folder.resolve() / NODE, flower_environment(folder.resolve() / NODE / "flwr")
    port = _free_port()
    if not (node / _SECRET).exists():
        write_private(node / _SECRET, secrets.token_bytes(32))
    secret = ["--superexec-auth-secret-file", str(node / _SECRET)]
    supernode = [
        *(sys.executable, "-m", "client.supernode"),
        *("--superlink", address, "--root-certificates", str(node / "ca.crt")),
        *("--auth-supernode-private-key", str(node / NODE_KEY)),
        *("--isolation", "process", "--host", "127.0.0.1", "--port", str(port), *secret),
        *("--node-config", f"socket={json.dumps(str(folder.resolve() / SOCKET))}"),
    ]
    app = [sys.executable, "-m", "client.app_process", f"127.0.0.1:{port}", str(node / _SECRET)]
    return [
        Child("supernode", supernode, node, environment, restart_s=_NODE_RESTART_S),
        Child("app", app, node, environment),
    ]


def _worker_child(folder: Path, config: SiteConfig) -> Child:
    command = [sys.executable, "-m", "client.cli", "worker", str(folder.resolve())]
    environment = dict(os.environ)
    if config.limits.threads is not None:
        environment["OMP_NUM_THREADS"] = str(config.limits.threads)
    return Child("worker", command, folder / config.state / "log", environment)


def _limit(config: SiteConfig) -> None:
    """Keep this process within the hospital's limits of processors and memory."""
    if config.limits.threads is not None:
        import torch

        torch.set_num_threads(config.limits.threads)
    if config.limits.memory_gb is not None:
        size = int(config.limits.memory_gb * 2**30)
        try:
            resource.setrlimit(resource.RLIMIT_DATA, (size, size))
        except ValueError:
            what = f"limits.memory_gb {config.limits.memory_gb:g} is more than this process may have"
            raise UsageError(Problem("site.yaml", what, "lower it")) from None


def _free_port() -> int:
    """A port for the node's own programs, on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
