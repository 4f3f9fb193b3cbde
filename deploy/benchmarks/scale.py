"""How long a round takes, and how much memory, with 10 to 10 000 sites on this machine; beside Flower's own simulation
and Apple's pfl-research, where they are installed, on the same work.

    python -m deploy.benchmarks.scale

Every site has 8 patients, or as many as `--patients` says, with an image of 28 pixels each, and takes two steps of SGD
on all of them with a Conv-4 of 8 filters; the server takes the mean. Each row is a process of its own with the
processes that it starts; memory is that of all of them together. In "private" the same steps are private queries:
clipped, with noise, charged to a ledger of each site before they begin.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import nn

from common.command_line import run
from common.plan import StudyPlan, plan_from_json
from deploy.benchmarks.plain_flower import conv4

PATIENTS, STEPS, RATE, WIDTH = 8, 2, 0.1, 8
LIMIT_S = 60.0  # a row that would take longer, judged by the one before it, is left out
_WATCH_S = 0.1

Ends = list[float]  # when each round was over, the start of the first one before them (seconds, monotonic)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def make_sites(folder: Path, sites: int, patients: int = PATIENTS) -> list[str]:
    """Site folders SITE00000 .. of drawn noise whose label is its brightness."""
    names = [f"site{number:05d}" for number in range(sites)]
    budget = f"{{epsilon: 50, delta: {_delta(patients)}}}"
    rng = np.random.default_rng(0)
    labels, numbers = np.arange(patients) % 2, np.arange(patients)
    for name in names:
        (folder / name).mkdir(parents=True)
        images = rng.integers(0, 196, (patients, 28, 28)) + 60 * labels[:, None, None]
        columns = {"labels": labels, "label_names": ["dark", "light"], "patient_ids": numbers}
        np.savez(folder / name / "data.npz", images=images.astype(np.uint8), **columns)
        (folder / name / "site.yaml").write_text(f"name: {name}\nnpz: data.npz\nbudget: {budget}\n")
    return names


def plan_of(names: list[str], *, rounds: int, private: bool, patients: int = PATIENTS) -> StudyPlan:
    """The study that is run."""
    privacy: Any = {"epsilon": 20, "delta": _delta(patients), "monitor": False} if private else "none"
    return StudyPlan.model_validate(
        {
            "study": "scale",
            "task": {"kind": "classification", "image_size": 28, "label_sets": {"light": ["dark", "light"]}},
            "sites": {name: {"labels": "light", "patients": patients} for name in names},
            "model": {"name": "conv4", "width": WIDTH, "trainable": "all"},
            "algorithm": {"name": "reptile", "inner_steps": STEPS, "inner_lr": RATE},
            "sampling": {"sample_rate": 1.0, "max_images_per_patient": 1},
            "privacy": privacy,
            "rounds": rounds,
            "quorum": len(names),
            "round_timeout_s": 36_000,
        }
    )


def _delta(patients: int) -> float:
    return min(0.01, 0.1 / patients)


def read_site(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 images (n, 1, 28, 28) and int64 labels (n,)."""
    with np.load(folder / "data.npz") as columns:
        images = torch.from_numpy(columns["images"]).float().unsqueeze(1) / 255.0
        return images, torch.from_numpy(columns["labels"])


def _patients_at(folder: Path) -> int:
    return len(read_site(folder)[1])


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    """What every site does, without privacy."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def plain_loop(folder: Path, names: list[str], rounds: int) -> Ends:
    """No federation at all: the sites one after the other, their images read in each round, and a running mean."""
    model, ends = conv4(WIDTH), [time.monotonic()]
    for _ in range(rounds):
        start = {name: value.clone() for name, value in model.state_dict().items()}
        mean = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in start.items()}
        for name in names:
            model.load_state_dict(start)
            train(model, *read_site(folder / name))
            for key, value in model.state_dict().items():
                mean[key] += value
        model.load_state_dict({key: (value / len(names)).float() for key, value in mean.items()})
        ends.append(time.monotonic())
    return ends


def consilium(folder: Path, names: list[str], rounds: int, *, private: bool = False, jobs: int = 1) -> Ends:
    """A whole federation on the local engine."""
    from server.observer import Unobserved
    from server.simulation import Federation, run_federation
    from server.start import initial_parameters

    class Watch(Unobserved):
        ends: Ends = []

        def round_started(self, round: int, sites: tuple[str, ...]) -> None:
            if round == 1:
                self.ends.append(time.monotonic())

        def round_committed(self, record: Any) -> None:
            if record.round:
                self.ends.append(time.monotonic())

    patients = _patients_at(folder / names[0])
    plan = plan_from_json(plan_of(names, rounds=rounds, private=private, patients=patients).to_json())
    federation = Federation(
        plan, folder.parent / "run", {name: folder / name for name in names}, initial_parameters(plan, folder)
    )
    watch = Watch()
    run_federation(federation, observer=watch, jobs=jobs)
    return watch.ends


def consilium_private(folder: Path, names: list[str], rounds: int) -> Ends:
    """The same with privacy and ledgers."""
    return consilium(folder, names, rounds, private=True)


def flower(folder: Path, names: list[str], rounds: int) -> Ends:
    """Flower's own simulation, on Ray with two processes, as its documentation has it."""
    import logging

    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    logging.disable(logging.CRITICAL)
    client, server = ClientApp(), ServerApp()
    ends: Ends = []

    @client.train()
    def train_site(message: Message, context: Context) -> Message:
        model = conv4(WIDTH)
        model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        train(model, *read_site(folder / names[int(context.node_config["partition-id"])]))
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        def note(round: int, arrays: ArrayRecord) -> MetricRecord:
            ends.append(time.monotonic())
            return MetricRecord()

        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=len(names), min_available_nodes=len(names))
        strategy.start(grid, ArrayRecord(conv4(WIDTH).state_dict()), num_rounds=rounds, evaluate_fn=note)

    init = {"num_cpus": 2, "include_dashboard": False, "log_to_driver": False, "logging_level": logging.CRITICAL}
    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=len(names),
        backend_config={"init_args": init, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    return ends


def pfl(folder: Path, names: list[str], rounds: int) -> Ends:
    """pfl-research's simulated backend in one process."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.internal.ops import pytorch_ops
    from pfl.internal.ops.selector import set_framework_module
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    set_framework_module(pytorch_ops)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = conv4(WIDTH)

        def loss(self, images: torch.Tensor, labels: torch.Tensor, eval: bool = False) -> torch.Tensor:
            return nn.functional.cross_entropy(self.network(images), labels)

        def metrics(self, images: torch.Tensor, labels: torch.Tensor, eval: bool = False) -> dict[str, Any]:
            return {}

    ends: Ends = [time.monotonic()]

    class Watch(TrainingProcessCallback):  # type: ignore[misc]
        def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
            ends.append(time.monotonic())
            return False, Metrics()

    def dataset(name: str) -> Any:
        return Dataset(raw_data=list(read_site(folder / name)), user_id=name)

    data = FederatedDataset(dataset, get_user_sampler("minimize_reuse", names))
    network = Model()
    central = torch.optim.SGD(network.parameters(), lr=1.0)
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(rounds, 10**9, len(names), None),
        backend=SimulatedBackend(training_data=data, val_data=data),
        model=PyTorchModel(network, local_optimizer_create=torch.optim.SGD, central_optimizer=central),
        model_train_params=NNTrainHyperParams(
            local_batch_size=_patients_at(folder / names[0]), local_num_epochs=STEPS, local_learning_rate=RATE
        ),
        callbacks=[Watch()],
        send_metrics_to_platform=False,
    )
    return ends


_FLOWER, _PFL = "Flower (Ray, 2 processes)", "pfl-research"
ENGINES: dict[str, Callable[[Path, list[str], int], Ends]] = {
    "plain loop": plain_loop,
    "Consilium": consilium,
    "Consilium, private": consilium_private,
    _FLOWER: flower,
    _PFL: pfl,
}
_NEEDS = {_FLOWER: "ray", _PFL: "pfl"}


@dataclass(frozen=True)
class Row:
    """One engine with so many sites."""

    engine: str
    sites: int
    rounds: list[float]  # seconds of each
    whole: float  # seconds of the process, with its start and what comes before the first round
    peak_mb: float  # resident memory of all its processes together

    def cells(self, beside: Row | None) -> list[str]:
        """As the table has them; `beside` is the plain loop."""
        seconds = median(self.rounds)
        ratio = f"{seconds / median(beside.rounds):.2f}" if beside else "-"
        per_site = f"{1000 * seconds / self.sites:.2f}"
        return [f"{self.sites:,}", self.engine, f"{seconds:.3g}", per_site, ratio, f"{self.peak_mb:.0f}"]


def measure(engine: str, sites: int, rounds: int, patients: int = PATIENTS) -> Row:
    """Run it in a process of its own, and watch the memory of that process and of all that it starts."""
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        names = make_sites(Path(folder) / "sites", sites, patients)
        process = multiprocessing.get_context("spawn").Process(target=_run, args=(engine, folder, names, rounds))
        began, peak = time.monotonic(), 0.0
        process.start()
        while process.is_alive():
            peak = max(peak, _resident_mb(process.pid or 0))
            process.join(_WATCH_S)
        if process.exitcode:
            raise RuntimeError(f"{engine} with {sites} sites failed: {process.exitcode}")
        ends = json.loads((Path(folder) / "ends.json").read_text())
    seconds = [end - start for start, end in itertools.pairwise(ends)]
    return Row(engine, sites, seconds[1:] or seconds, time.monotonic() - began, peak)


def too_long(row: Row, *, sites: int, limit_s: float) -> bool:
    """Whether two rounds with so many sites would take longer, if a site takes what it took in `row`."""
    return 3 * median(row.rounds) * sites / row.sites > limit_s  # two rounds, and what comes before them


def rounds_of(sites: int) -> int:
    """How many are run: the first one is not counted, if there are others."""
    return 6 if sites <= 100 else 2


def table(rows: list[Row], remarks: list[str], patients: int = PATIENTS) -> Iterator[str]:
    """Markdown."""
    threads = f"{os.cpu_count()} cores, one thread a process"
    work = f"two steps of SGD at each site of {patients} images"
    yield f"{platform.machine()}, {threads}, torch {torch.__version__}; {work}"
    yield ""
    yield "| sites | engine | s a round | ms a site | beside the plain loop | peak MB |"
    yield "|---|---|---|---|---|---|"
    loops = {row.sites: row for row in rows if row.engine == "plain loop"}
    for row in sorted(rows, key=lambda row: row.sites):
        yield f"| {' | '.join(row.cells(loops.get(row.sites)))} |"
    yield ""
    yield from remarks


@app.command()
def main(
    sites: Annotated[list[int] | None, typer.Option(help="How many; once for each.")] = None,
    engine: Annotated[list[str] | None, typer.Option(help=f"Of: {', '.join(ENGINES)}; once for each.")] = None,
    patients: Annotated[int, typer.Option(min=2, help="Of each site, with an image each.")] = PATIENTS,
    limit_s: Annotated[float, typer.Option(help="Leave out what would take longer, by the row before.")] = LIMIT_S,
) -> None:
    """Seconds and memory of a round with many sites."""
    rows, remarks = [], []
    for name in engine or ENGINES:
        if importlib.util.find_spec(_NEEDS.get(name, "torch")) is None:
            remarks.append(f"{name} is not installed.")
            continue
        last: Row | None = None
        for count in sorted(sites or (10, 100, 1_000, 10_000)):
            if last is not None and too_long(last, sites=count, limit_s=limit_s):
                remarks.append(f"{name} with {count:,} sites would take more than {limit_s:g} s.")
                break
            last = measure(name, count, rounds_of(count), patients)
            rows.append(last)
    typer.echo("\n".join(table(rows, remarks, patients)))


def _run(engine: str, folder: str, names: list[str], rounds: int) -> None:
    torch.set_num_threads(1)
    multiprocessing.current_process().name = "MainProcess"  # pfl takes any other for a process that loads data
    os.chdir(folder)
    ends = ENGINES[engine](Path(folder) / "sites", names, rounds)
    (Path(folder) / "ends.json").write_text(json.dumps(ends))


def _resident_mb(root: int) -> float:
    """Of a process and its descendants; pages that they share are counted once for each."""
    parents = dict(_processes())
    family = {root}
    for _ in range(6):  # generations
        family |= {pid for pid, parent in parents.items() if parent in family}
    return sum(map(_resident, family)) / 2**20


def _processes() -> Iterator[tuple[int, int]]:
    """(process, its parent)"""
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                stat = Path(entry.path, "stat").read_text()
            except OSError:  # it is gone
                continue
            yield int(entry.name), int(stat.rpartition(")")[2].split()[1])


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):  # it is gone
        return 0


if __name__ == "__main__":
    run(app)
