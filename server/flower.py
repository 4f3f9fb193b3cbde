"""The lab's SuperLink: Flower's server, on loopback alone, and what the lab says to it.

Its Control API has no login: whoever reaches the port can start runs. So it listens on loopback, and hospitals reach it
through `server.gateway`, which lets only the nodes' own calls through.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from common.children import Child, flower_environment
from common.errors import RunError
from common.files import write_atomically
from server.lab import Lab

BUNDLE = Path(__file__).parents[1] / "deploy" / "fab"  # code-free: hospitals run what they installed

_CONNECTION = "lab"
_CALL_S = 60.0


@dataclass(frozen=True)
class Node:
    """A node that the SuperLink knows."""

    id: int
    name: str
    key: bytes  # as `server.gateway.key_bytes`
    status: str  # registered, online, offline

    @property
    def online(self) -> bool:
        return self.status == "online"


@dataclass(frozen=True)
class FlowerRun:
    """A run that the SuperLink knows."""

    id: int
    status: str  # pending, starting, running, finished
    end: str  # completed, failed, stopped; empty before

    @property
    def ended(self) -> bool:
        return self.status == "finished"


def superlink_children(lab: Lab) -> list[Child]:
    """The SuperLink and the SuperExec that starts ServerApps: apart, so that a run outlives a kill of either."""
    _write_connection(lab)
    home, folder = lab.superlink / "flwr", lab.superlink
    environment = flower_environment(home)
    address = ["127.0.0.1", str(lab.config.superlink_port)]
    secret = ["--superexec-auth-secret-file", str(lab.superexec_secret)]
    certificates = [
        *("--ssl-ca-certfile", str(lab.authority.certificate)),
        *("--ssl-certfile", str(lab.server_certificate)),
        *("--ssl-keyfile", str(lab.server_key)),
    ]
    superlink = [
        *_program("flower-superlink"),
        *("--host", address[0], "--port", address[1], *certificates),
        *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
        *("--database", str(folder / "superlink.sqlite"), "--isolation", "process", *secret),
    ]
    superexec = [
        *_program("flower-superexec"),
        *("--runtime-api-address", ":".join(address), "--root-certificates", str(lab.authority.certificate), *secret),
    ]
    return [
        Child("superlink", superlink, folder, environment),
        Child("superexec", superexec, folder, environment),
    ]


class Control:
    """The Control API of the lab's SuperLink. Each call raises RunError if it does not answer."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._client = ControlHttpClient.from_server_address(
            server_address=f"127.0.0.1:{lab.config.superlink_port}",
            insecure=False,
            root_certificates=lab.authority.certificate.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def nodes(self) -> list[Node]:
        """Every node that is let in."""
        with _told():
            found = self._client.ListNodes(ListNodesRequest()).nodes_info
        return [
            Node(id=node.node_id, name=node.name, key=node.public_key, status=node.status)
            for node in found
            if node.status != "unregistered"
        ]

    def register(self, name: str, key: bytes) -> None:
        """Let the node with this public key in, as `name`."""
        with _told():
            self._client.RegisterNode(RegisterNodeRequest(public_key=key, name=name))

    def unregister(self, node: Node) -> None:
        """Let it in no more."""
        with _told():
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node.id))

    def submit(self, bundle: Path, **run_config: str) -> int:
        """Start the ServerApp of `bundle`; Flower's number of the run."""
        config = " ".join(f"{name}={json.dumps(value)}" for name, value in run_config.items())
        answer = _flwr(self._lab, "run", str(bundle), _CONNECTION, "-c", config, "--format", "json")
        return int(answer["run-id"])

    def run(self, run_id: int) -> FlowerRun | None:
        """How Flower sees a run; None if it knows of none."""
        with _told():
            known = self._client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict
        if run_id not in known:
            return None
        return FlowerRun(run_id, known[run_id].status.status, known[run_id].status.sub_status)

    def stop(self, run_id: int) -> None:
        """End a run."""
        with _told():
            self._client.StopRun(StopRunRequest(run_id=run_id))


@contextmanager
def _told() -> Iterator[None]:
    """What goes wrong in a call, as RunError."""
    try:
        yield
    except Exception as error:  # httpx's, and Flower's own many
        text = " ".join(str(error).split())[:300]
        raise RunError(f"the lab's SuperLink did not answer ({text}). Does `consilium-lab serve` run?") from None


def _write_connection(lab: Lab) -> None:
    text = (
        f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\n'
        f'address = "127.0.0.1:{lab.config.superlink_port}"\n'
        f"root-certificates = {json.dumps(str(lab.authority.certificate))}\n"
    )
    write_atomically(lab.superlink / "flwr" / "config.toml", text.encode())


def _flwr(lab: Lab, *arguments: str) -> dict[str, Any]:
    """One call of Flower's own command line; its JSON answer."""
    done = subprocess.run(
        [*_program("flwr"), *arguments],
        cwd=lab.superlink,
        env=flower_environment(lab.superlink / "flwr"),
        capture_output=True,
        text=True,
        timeout=_CALL_S,
        check=False,
    )
    try:
        answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        answer = {"success": False, "error-message": (done.stderr or done.stdout).strip()[-500:]}
    if done.returncode or not answer.get("success", True):
        what = answer.get("error-message") or f"exit code {done.returncode}"
        raise RunError(f"the SuperLink did not do `flwr {arguments[0]}`: {' '.join(what.split())}")
    return answer


def _program(name: str) -> list[str]:
    """Flower's program beside this Python."""
    return [str(Path(sys.executable).parent / name)]
