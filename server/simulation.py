"""A whole federation on one machine: the same ServerApp, ClientApp and workers as the real one.

Every federation has its own run folder, and in it for each site its own ledger. This is also the one place where the
lab's side may look at sites' images: they are the researcher's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp

from client.adapt import ceiling_trials, few_shot_trials
from client.app import build_client_app
from client.data.checks import describe
from client.data.cutting import make_sites
from client.data.dataset import SiteData
from client.data.load import load_images, load_site
from client.data.phantoms import PROFILES, make_phantom_sites
from client.site import load_site_config
from client.worker import Worker
from common.errors import DataError, Problem, Refusal, SiteUnfit, UsageError
from common.params import Params, to_arrays
from common.plan import StudyPlan
from common.records import PrepareInstruction, SiteReply, TrainInstruction
from common.trials import Kind, Trial
from server.app import build_server_app
from server.local_grid import LocalGrid
from server.observer import Observer, Unobserved
from server.pretrain import PublicSet
from server.ray_engine import run_on_ray
from server.run_folder import run_plan, starting_parameters
from server.strategy import RunSettings

__all__ = ["PROFILES", "describe", "make_phantom_sites", "make_sites"]  # of the sites' side, for the lab's command line

Engine = Literal["local", "ray"]

_PHANTOM_TEST_SHARE = 0.25  # of a phantom hospital's patients, who never train

_workers: dict[Path, Worker] = {}  # warm ones of this process, by state folder


@dataclass(frozen=True)
class Federation:
    """One plan, run over sites on this machine."""

    plan: StudyPlan
    folder: Path  # the run folder
    site_folders: dict[str, Path]  # by the plan's names; a training site without one does not take part
    initial: Params  # a whole network of the plan

    @property
    def training_sites(self) -> tuple[str, ...]:
        """The sites that take part, in the plan's order; node i is the i-th."""
        return tuple(name for name in self.plan.training_sites if name in self.site_folders)


def run_federation(
    federation: Federation,
    *,
    engine: Engine = "local",
    observer: Observer | None = None,
    resume: bool = False,
    jobs: int = 1,
) -> None:
    """Run the rounds that are not committed yet, `jobs` sites at once; the result is in the run folder.

    Raises UsageError, RunError or CheckpointError as the run itself does.
    """
    sites = SimulatedSites(
        federation.folder.resolve(),
        tuple((name, federation.site_folders[name].resolve()) for name in federation.training_sites),
    )
    try:
        drive(federation, build_client_app(sites), engine=engine, observer=observer, resume=resume, jobs=jobs)
    finally:
        for state in list(_workers):
            if state.is_relative_to(sites.folder):
                del _workers[state]


def drive(
    federation: Federation,
    client_app: ClientApp,
    *,
    engine: Engine,
    observer: Observer | None = None,
    resume: bool = False,
    jobs: int = 1,
) -> None:
    """Run the federation's ServerApp against `client_app` on one node for each training site."""
    nodes = len(federation.training_sites)
    if nodes < federation.plan.quorum:
        missing = [name for name in federation.plan.training_sites if name not in federation.site_folders]
        what = f"{nodes} training sites have data here, and the quorum is {federation.plan.quorum}"
        raise UsageError(Problem(f"study {federation.plan.study}", what, f"add the folders of: {', '.join(missing)}"))
    settings = RunSettings(
        plan=federation.plan,
        folder=federation.folder.resolve(),
        initial=federation.initial,
        resume=resume,
        nodes=nodes,
    )
    server_app = build_server_app(settings, observer or Unobserved())
    if engine == "ray":
        run_on_ray(server_app, client_app, nodes=nodes, jobs=jobs, home=settings.folder / "flower", stop=settings.stop)
    else:
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
        server_app(LocalGrid(client_app, nodes=nodes, jobs=jobs), context)


@dataclass(frozen=True)
class SimulatedSites:
    """Which node is which site. Travels to Ray's processes."""

    folder: Path  # the run folder
    sites: tuple[tuple[str, Path], ...]  # name and data folder, by partition-id

    def __call__(self, context: Context) -> SimulatedSite:
        name, data = self.sites[int(context.node_config["partition-id"])]
        return SimulatedSite(name=name, data=data, run=self.folder)


@dataclass(frozen=True, kw_only=True)
class SimulatedSite:
    """One site's worker, warm in this process."""

    name: str
    data: Path
    run: Path

    @property
    def state(self) -> Path:
        """Where this federation keeps the site's ledger and releases."""
        return self.run / "sites" / self.name

    def prepare(self, instruction: PrepareInstruction) -> SiteReply:
        """Open the site, and prepare it. A site that cannot be opened says so by its name."""
        try:
            worker = Worker(self.data, state=self.state, simulated=True)
        except DataError:
            return _refuse(self.name, SiteUnfit())
        _workers[self.state] = worker
        return worker.prepare(instruction)

    def train(self, instruction: TrainInstruction) -> SiteReply:
        """The site's release. Under Ray another process may have prepared it: then this one does so first."""
        if self.state not in _workers:
            prepared = self.prepare(
                PrepareInstruction(
                    plan_json=run_plan(self.run).to_json(), initial=to_arrays(starting_parameters(self.run))
                )
            )
            if not prepared.ok:
                return prepared
        return _workers[self.state].train(instruction)


def _refuse(site: str, refusal: Refusal) -> SiteReply:
    return SiteReply(site=site, code=refusal.code, reason=refusal.public_reason)


@dataclass(frozen=True)
class SimulatedData:
    """One site's images on the researcher's machine."""

    rows: SiteData
    phantom: bool

    def measurable(self, kind: Kind) -> bool:
        """Whether there are two patients and two labels, one for support and one for query."""
        rows = self.evaluated(kind)
        return len(rows.patients.unique()) > 1 and len(rows.labels.unique()) > 1

    def evaluated(self, kind: Kind) -> SiteData:
        """What is measured on: all of a held-out site, the patients who never train of a training site."""
        return self.rows.of_split("test") if kind == "held-out patients" else self.rows

    def examples(self, per_label: int) -> Iterator[tuple[str, np.ndarray]]:
        """(label, uint8 (H, W) or (H, W, 3)): the first images of each label."""
        for label, name in enumerate(self.rows.label_names):
            for index in (self.rows.labels == label).nonzero().flatten()[:per_label].tolist():
                image = self.rows.images[index].permute(1, 2, 0).numpy()
                yield name, image[..., 0] if image.shape[2] == 1 else image


def load_simulated(folder: Path, plan: StudyPlan, site: str) -> SimulatedData:
    """A site's images, fitted to the plan. Raises DataError with every problem of its files."""
    return SimulatedData(load_site(folder, plan, site=site), load_site_config(folder).phantom)


def load_public(folder: Path, plan: StudyPlan) -> PublicSet:
    """A public data set in the form of a site folder, fitted to the plan's image size. Raises DataError."""
    data = load_images(folder, image_size=plan.task.image_size, channels=plan.task.channels)
    return PublicSet(data.site, data.images, data.labels, data.ways)


def evaluate_start(start: Params | None, data: SimulatedData, plan: StudyPlan, *, arm: str, kind: Kind) -> list[Trial]:
    """Few-shot adaptation from `start` at one site; None is a random initialization."""
    return few_shot_trials(start, data.evaluated(kind), plan, arm=arm, kind=kind, seed=plan.seed)


def evaluate_ceiling(start: Params, data: SimulatedData, plan: StudyPlan, *, kind: Kind) -> list[Trial]:
    """The same network trained on all of the site's support patients."""
    return ceiling_trials(start, data.evaluated(kind), plan, kind=kind, seed=plan.seed)


def site_folders(root: Path) -> Mapping[str, Path]:
    """The site folders below `root`, by the name in their site.yaml.

    Raises DataError if a site.yaml is not valid, a name stands twice, or there is none.
    """
    found: dict[str, Path] = {}
    for path in sorted(root.glob("*/site.yaml")):
        name = load_site_config(path.parent).name
        if name in found:
            raise DataError(Problem(str(path), f"site {name!r} is also in {found[name]}", "rename one of them"))
        found[name] = path.parent
    if not found:
        raise DataError(Problem(str(root), "holds no site folder (a folder with a site.yaml)", "check the path"))
    return found


def draw_phantoms(plan: StudyPlan, root: Path) -> Mapping[str, Path]:
    """A phantom hospital below `root` for every site of the plan, with as many training patients as it declares.

    Hospitals that are there already stay as they are. Raises UsageError for a site that is no phantom hospital.
    """
    strangers = [name for name in plan.sites if name not in PROFILES]
    if strangers:
        what = f"{', '.join(strangers)} is no phantom hospital (they are: {', '.join(PROFILES)})"
        raise UsageError(Problem(f"study {plan.study}", what, "give the sites' folders with --sites DIR"))
    for name, site in plan.sites.items():
        if not (root / name).exists():
            make_phantom_sites(
                root,
                names=[name],
                patients=_phantom_patients(site.patients, ways=len(plan.labels_of(name))),
                image_size=plan.task.image_size,
                channels=plan.task.channels,
                seed=plan.seed,
                test_fraction=_PHANTOM_TEST_SHARE,
            )
    return site_folders(root)


def _phantom_patients(training: int, *, ways: int) -> int:
    """The fewest patients of which, label by label, `training` are left when the test share is taken."""

    def left(total: int) -> int:
        of_label = [len(range(label, total, ways)) for label in range(ways)]
        return sum(count - round(_PHANTOM_TEST_SHARE * count) for count in of_label)

    return next(total for total in itertools.count(training) if left(total) >= training)
