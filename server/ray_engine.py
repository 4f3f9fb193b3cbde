"""Flower's simulation on Ray, in one place: it is private to Flower, and leans on the process it runs in.

Ray's processes import from the working directory and from sys.path as this process has it: so it runs in an empty
folder, with this program's own root first. Its cluster is its own (`address: local`), whatever else listens here, but
where the environment's ADDRESS names one: then sites run on all of its machines, which see the same folders.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from common.errors import Problem, RunError, UsageError

ADDRESS = "CONSILIUM_RAY_ADDRESS"  # of a Ray cluster, host:port

_ROOT = Path(__file__).resolve().parent.parent


def run_on_ray(
    server_app: ServerApp, client_app: ClientApp, *, nodes: int, jobs: int, home: Path, stop: threading.Event
) -> None:
    """Run `server_app` against `nodes` virtual nodes, `jobs` of them at once, each on one CPU and one thread, all on
    this machine's GPUs if it has any; on a cluster that is there already as many as it has CPUs.

    `home` is a folder of its own, for Flower's files. `stop` ends the ServerApp when Ray fails. What the ServerApp
    raises comes out as it is; raises UsageError if Ray is not installed, RunError if it fails.
    """
    if importlib.util.find_spec("ray") is None:
        remedy = "pip install 'consilium[simulation]', or take --engine local"
        raise UsageError(Problem("--engine ray", "Ray is not installed", remedy))
    from flwr.simulation.run_simulation import _run_simulation
    from flwr.supercore.telemetry import EventType

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if ADDRESS in os.environ:
        init = {"address": os.environ[ADDRESS], **quiet}
    else:
        init = {"address": "local", "num_cpus": jobs, "include_dashboard": False, **quiet}
    with _neutral(home):
        try:
            _run_simulation(
                num_supernodes=nodes,
                exit_event=EventType.PYTHON_API_RUN_SIMULATION_LEAVE,
                client_app=client_app,
                server_app=server_app,
                backend_config={"init_args": init, "client_resources": {"num_cpus": 1, "num_gpus": gpu_share(jobs)}},
            )
        except RuntimeError as error:
            if error.__cause__ is None:  # not Flower's own, which wraps what went wrong in Ray
                raise
            raise RunError(f"Ray failed: {_first(error)} -- try --engine local") from error
        finally:
            stop.set()


def gpu_share(jobs: int) -> float:
    """Of a GPU for each of `jobs` sites at once, at most a whole one; Ray shows none to a site with a share of 0."""
    import torch

    return min(1.0, torch.cuda.device_count() / jobs)


@contextmanager
def _neutral(home: Path) -> Iterator[None]:
    """An empty working directory, and this program first on the path of Ray's processes; put back afterwards."""
    empty = home / "empty"
    empty.mkdir(parents=True, exist_ok=True)
    environment, folder, path = dict(os.environ), Path.cwd(), list(sys.path)
    os.environ |= {"FLWR_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    sys.path[:] = [str(_ROOT), *(entry for entry in sys.path if entry)]
    os.chdir(empty)
    try:
        yield
    finally:
        os.chdir(folder)
        sys.path[:] = path
        os.environ.clear()
        os.environ.update(environment)


def _first(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0]
