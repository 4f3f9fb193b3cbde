"""What a round over the network costs beside the training itself, and beside a round of plain Flower.

    python -m deploy.benchmarks.rounds --rounds 7

runs two federations on this machine, one after the other, each with its real programs on loopback: Consilium's lab and
hospitals (TLS, node authentication, the wall, the ledger), and plain Flower's SuperLink and SuperNodes without any of
these, with an app as its tutorials write it. Both train a Conv-4 of 32 filters for a few steps. It prints the median
seconds of a round after the first, and the share that is not training.
"""

from __future__ import annotations

import json
import logging
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from client.data.phantoms import PROFILES, make_phantom_sites
from common.children import Child, flower_environment, stop_all
from common.command_line import run
from deploy.local_federation import ROOT, free_ports, local_federation, wait_for

STEPS = 5
PATIENTS = 60  # who train
PHANTOMS: dict[str, Any] = {"patients": 80, "image_size": 28, "channels": 1, "seed": 1, "test_fraction": 0.25}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

PLAN = {
    "study": "rounds",
    "model": {"name": "conv4", "width": 32, "trainable": "all"},
    "algorithm": {"name": "reptile", "inner_steps": STEPS, "inner_lr": 0.1},
    "round_timeout_s": 120,
    "sampling": {"sample_rate": 0.2, "max_images_per_patient": 2},
    "privacy": {"epsilon": 8, "clip": 1.0},
    "evaluation": {"shots": [1], "splits": 2, "draws": 1},
}
BUNDLE = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "plain"
version = "0.1.0"
description = "FedAvg"
license = {file = "LICENSE"}
requires-python = ">=3.11"
dependencies = ["flwr>=1.41.0,<1.42"]

[tool.flwr.app]
publisher = "benchmark"
fab-format-version = 1
flwr-version-target = "1.41.0"
fab-include = ["LICENSE", "*.py"]

[tool.flwr.app.components]
serverapp = "plain_flower:server"
clientapp = "plain_flower:client"

[tool.flwr.app.config]
steps = 0
rounds = 0
sites = 0
out = ""
"""


@dataclass(frozen=True)
class Rounds:
    """What one federation took, round by round, in seconds."""

    name: str
    seconds: list[float]
    training: list[float]  # the slowest site's

    @property
    def others(self) -> list[float]:
        """Everything but the training."""
        return [whole - training for whole, training in zip(self.seconds, self.training, strict=True)]


def plan_of(names: list[str], rounds: int) -> dict[str, Any]:
    """A study of these phantom hospitals, each with its own question."""
    labels = {name: list(PROFILES[name].labels) for name in names}
    return PLAN | {
        "task": {"kind": "classification", "image_size": 28, "channels": 1, "label_sets": labels},
        "sites": {name: {"labels": name, "patients": PATIENTS} for name in names},
        "rounds": rounds,
        "quorum": len(names),
    }


def consilium(folder: Path, *, sites: int, rounds: int) -> Rounds:
    """A study over the network. A site tells its time as a power of two; half of it is certain to be training."""
    names = sorted(PROFILES)[:sites]
    make_phantom_sites(folder, names=names, **PHANTOMS)
    study = folder / "rounds.yaml"
    study.write_text(yaml.safe_dump(plan_of(names, rounds)))
    with local_federation(folder, names) as federation:
        following = federation.run(study)
        for name in names:
            federation.approve(name, study, by_command=False)
        federation.finish(following)
        records = federation.history("rounds")[1:]
    slowest = [max(site["seconds"] for site in record["sites"]) for record in records]
    return Rounds("Consilium", [record["seconds"] for record in records], [bucket / 2 for bucket in slowest])


def plain_flower(folder: Path, *, sites: int, rounds: int) -> Rounds:
    """The same number of rounds, nodes and steps with Flower's own programs, as its documentation starts them."""
    programs, out, environment = Path(sys.executable).parent, folder / "out.json", flower_environment(folder / "flwr")
    superlink, *ports = free_ports(1 + sites)
    commands = {"superlink": ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(superlink)]}
    for number, port in enumerate(ports):
        address = ["--superlink", f"127.0.0.1:{superlink}", "--host", "127.0.0.1", "--port", str(port)]
        commands[f"node{number}"] = ["flower-supernode", "--insecure", *address]
    children = [Child(name, [str(programs / c[0]), *c[1:]], folder, environment) for name, c in commands.items()]
    _write_bundle(folder / "bundle")
    (folder / "flwr").mkdir()
    (folder / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "plain"\n\n[superlink.plain]\naddress = "127.0.0.1:{superlink}"\ninsecure = true\n'
    )
    try:
        for child in children:
            child.tend(logging.getLogger("rounds"))
        wait_for("Flower's SuperLink", lambda: _listens(superlink))
        config = f"steps={STEPS} rounds={rounds} sites={sites} out={json.dumps(str(out))}"
        submit = [str(programs / "flwr"), "run", str(folder / "bundle"), "plain", "-c", config]
        subprocess.run(submit, cwd=folder, env=environment, check=True, capture_output=True, timeout=120)
        wait_for("the rounds of plain Flower", out.exists, seconds=60.0 * rounds + 120)
        return Rounds("plain Flower", **json.loads(out.read_text()))
    finally:
        stop_all(children)


def table(measured: list[Rounds]) -> Table:
    """Medians over the rounds after the first."""
    shown = Table("", "seconds a round", "of it training", "the rest", "the rest beside plain Flower", "first round")
    reference = median(measured[-1].others[1:])
    for one in measured:
        whole, training, rest = (median(values[1:]) for values in (one.seconds, one.training, one.others))
        figures = [f"{whole:.2f}", f"{training:.2f}", f"{rest:.2f}", f"{rest / reference:.2f}", f"{one.seconds[0]:.2f}"]
        shown.add_row(one.name, *figures)
    return shown


@app.command()
def main(
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of each federation.")] = 7,
    sites: Annotated[int, typer.Option(min=1, max=len(PROFILES), help="Hospitals of each.")] = 2,
) -> None:
    """Seconds of a round over the network beside plain Flower."""
    console = Console()
    measured = []
    with tempfile.TemporaryDirectory(prefix="rounds-") as folder:
        for name, federation in (("consilium", consilium), ("plain", plain_flower)):
            (Path(folder) / name).mkdir()
            with console.status(f"{name}: {rounds} rounds with {sites} sites"):
                measured.append(federation(Path(folder) / name, sites=sites, rounds=rounds))
    console.print(table(measured))


def _write_bundle(folder: Path) -> None:
    folder.mkdir()
    (folder / "pyproject.toml").write_text(BUNDLE)
    shutil.copy(ROOT / "LICENSE", folder)
    shutil.copy(Path(__file__).parent / "plain_flower.py", folder)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


if __name__ == "__main__":
    run(app)
