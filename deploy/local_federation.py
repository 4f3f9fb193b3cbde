"""A lab and hospitals as real processes on one machine, by the command lines that people type: for tests and
benchmarks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from client import approval
from client.wall import SOCKET, WorkerProxy
from common.errors import RunError, WorkerUnavailable
from common.plan import load_plan

ROOT = Path(__file__).parents[1]
_ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}


def command(program: str, *arguments: object) -> list[str]:
    """`consilium-lab` or `consilium-site` with this Python."""
    module = {"consilium-lab": "server.cli", "consilium-site": "client.cli"}[program]
    return [sys.executable, "-m", module, *map(str, arguments)]


def call(
    program: str, *arguments: object, code: int | None = 0, seconds: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. Raises RunError if it ends with another code than `code`; None takes any."""
    done = subprocess.run(
        command(program, *arguments), env=_ENVIRONMENT, capture_output=True, text=True, timeout=seconds
    )
    if code not in (None, done.returncode):
        raise RunError(f"{arguments} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def told(program: str, *arguments: object, code: int | None = 0) -> Any:
    """The JSON that a command prints."""
    return json.loads(call(program, *arguments, "--json", code=code).stdout)


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nobody uses now."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def wait_for(what: str, condition: Callable[[], object], *, seconds: float = 240) -> None:
    """Wait until it holds. Raises RunError, naming `what`, if it does not within the time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RunError(f"waited {seconds:g} s for {what}")
        time.sleep(0.2)


class LocalFederation:
    """Everything below `folder`; processes that were started end with `stop`."""

    def __init__(
        self,
        folder: Path,
        sites: Sequence[str],
        *,
        host: str = "127.0.0.1",
        inside: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """`host` is where sites reach the lab; `inside` puts words before the service of a site."""
        self.inside = inside or {}
        self.folder, self.lab, self.sites = folder, folder / "lab", tuple(sites)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        port, superlink, metrics, health = free_ports(4)
        self.address = f"{host}:{port}"
        self.fingerprint = told("consilium-lab", "provision", "--lab", self.lab, "--address", self.address)[
            "fingerprint"
        ]
        config = yaml.safe_load((self.lab / "lab.yaml").read_text())
        config |= {"superlink_port": superlink, "metrics_port": metrics, "health_port": health}
        config["listen"] = self.address
        (self.lab / "lab.yaml").write_text(yaml.safe_dump(config))
        self.metrics_port, self.health_port = metrics, health
        for site in sites:
            self.enroll(site, folder / site)

    def enroll(self, site: str, folder: Path) -> None:
        """init, enroll, join."""
        with (folder / "site.yaml").open("a") as file:
            file.write("verified_install: false\n")
        request = told("consilium-site", "init", folder, "--name", site)
        bundle = self.folder / f"{site}.bundle.json"
        options = ("--fingerprint", request["fingerprint"], "--out", bundle, "--lab", self.lab)
        call("consilium-lab", "enroll", request["request"], *options)
        call("consilium-site", "join", bundle, "--site", folder, "--fingerprint", self.fingerprint)

    def start(self, name: str, *arguments: object) -> None:
        """Start a service under `name`; its output goes to NAME.out."""
        program = "consilium-lab" if name == "lab" else "consilium-site"
        with (self.folder / f"{name}.out").open("ab") as output:
            self.running[name] = subprocess.Popen(
                [*self.inside.get(name, ()), *command(program, *arguments)],
                env=_ENVIRONMENT,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def start_lab(self) -> None:
        self.start("lab", "serve", "--lab", self.lab)

    def start_site(self, site: str) -> None:
        self.start(site, "start", self.folder / site)

    def start_all(self) -> None:
        self.start_lab()
        for site in self.sites:
            self.start_site(site)
        wait_for("all nodes", lambda: self.online() == set(self.sites))
        for site in self.sites:
            wait_for(f"{site}'s worker", partial(self.worker_answers, site))

    def worker_answers(self, site: str) -> bool:
        try:
            return WorkerProxy(self.folder / site / SOCKET).hello()["site"] == site
        except WorkerUnavailable:
            return False

    def online(self) -> set[str]:
        """Who is connected, by the lab's metrics."""
        metrics = self.metrics()
        return {site for site in self.sites if f'consilium_site_online{{site="{site}"}} 1.0' in metrics}

    def metrics(self) -> str:
        """What Prometheus would read; empty while the lab does not serve."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=5) as answer:
                text: str = answer.read().decode()
                return text
        except OSError:
            return ""

    def run(self, study: Path, *, minutes: float = 5) -> subprocess.Popen[str]:
        """`consilium-lab run` in the background."""
        return subprocess.Popen(
            command("consilium-lab", "run", study, "--lab", self.lab, "--wait", minutes),
            env=_ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def approve(self, site: str, study: Path, *, by_command: bool = True) -> None:
        """Approve the study when it has come to the site; without `by_command` by what the command calls."""
        folder, plan = self.folder / site, load_plan(study)
        wait_for(f"{study.stem} at {site}", (folder / "state" / "pending" / f"{plan.digest}.json").exists)
        if by_command:
            call("consilium-site", "approve", plan.digest[:12], "--site", folder, "--yes", "--by", "Dr Example")
        else:
            approval.approve(folder / "state", plan, by="Dr Example")

    def finish(self, process: subprocess.Popen[str], *, code: int = 0, seconds: float = 500) -> str:
        out, err = process.communicate(timeout=seconds)
        if process.returncode != code:
            raise RunError(f"it ended with {process.returncode}\n{out}\n{err}\n{self.logs()}")
        return out + err

    def history(self, study: str) -> list[dict[str, Any]]:
        file = self.lab / "runs" / study / "history.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def logs(self) -> str:
        files = [*self.folder.glob("*.out"), *self.lab.glob("log/*.log"), *self.lab.glob("superlink/*.log")]
        files += [log for site in self.sites for log in (self.folder / site).glob("*/*.log")]
        return "\n".join(f"==> {file}\n{file.read_text(errors='replace')[-1500:]}" for file in files)

    def stop(self) -> None:
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def local_federation(folder: Path, sites: Sequence[str], **options: Any) -> Iterator[LocalFederation]:
    """Joined sites and a lab, started; stopped at the end."""
    federation = LocalFederation(folder, sites, **options)
    try:
        federation.start_all()
        yield federation
    finally:
        federation.stop()
