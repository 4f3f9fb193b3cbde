"""A whole federation on one machine: the same ServerApp, ClientApp and workers as the real one.

Every federation has its own run folder, and in it for each site its own ledger. This is also the one place where the
lab's side may look at sites' images: they are the researcher's own.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp

from client.adapt import Sight, ceiling_trials, few_shot_trials, sights
from client.app import build_client_app
from client.data.dataset import SiteData
from client.data.load import load_images, load_site
from client.data.phantoms import PROFILES, make_phantom_sites
from client.release_store import ReleaseStore
from client.site import load_site_config
from client.splits import objection_to
from client.worker import Worker
from common.algorithms.mrmtl import PERSONAL
from common.errors import DataError, Problem, Refusal, SiteUnfit, UsageError
from common.params import Params, to_arrays
from common.plan import RowFilter, StudyPlan
from common.records import PrepareInstruction, SiteReply, TrainInstruction
from common.timing import timed
from common.trials import Kind, Trial
from server.app import build_server_app
from server.local_grid import LocalGrid
from server.observer import Observer, Unobserved
from server.public_sets import PublicSet
from server.ray_engine import run_on_ray
from server.run_folder import run_plan, starting_parameters
from server.strategy import RunSettings

__all__ = [  # of the sites' side, for the lab's
    "Sight",
    "SiteData",
    "sights",
]

Engine = Literal["local", "ray"]

_WARM = 256  # workers of this process: of more sites than that the others are opened again in each round
_SHARED_BYTES = 2**30  # of images, over all sites and federations of this process
_ROW_BYTES = 1024  # of what is known of an image beside its pixels

_PHANTOM_TEST_SHARE = 0.25  # of a phantom hospital's patients, who never train

_workers: dict[Path, Worker] = {}  # warm ones of this process, by state folder; the last used last
_starts: dict[Path, PrepareInstruction] = {}  # what the federations of this process sent, by run folder


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
        _starts.pop(sites.folder, None)
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
    """One site's worker, warm in this process if it was among the last ones."""

    name: str
    data: Path
    run: Path

    @property
    def state(self) -> Path:
        """Where this federation keeps the site's ledger and releases."""
        return self.run / "sites" / self.name

    @timed("site")
    def prepare(self, instruction: PrepareInstruction) -> SiteReply:
        """Open the site, and prepare it. A site that cannot be opened says so by its name."""
        worker, prepared = self._opened(instruction)
        if worker is not None:
            self._keep_warm(worker)
        return prepared

    @timed("site")
    def train(self, instruction: TrainInstruction) -> SiteReply:
        """The site's release. A site that is not warm here, or was prepared by another process, is prepared first."""
        worker = _workers.pop(self.state, None)  # in one step: another site's thread may cool it down at any time
        if worker is None:
            worker, prepared = self._opened(_starts.get(self.run) or _start_in(self.run))
            if worker is None:
                return prepared
        try:
            return worker.train(instruction)
        finally:
            self._keep_warm(worker)

    def _opened(self, instruction: PrepareInstruction) -> tuple[Worker | None, SiteReply]:
        """The site's worker, if it could be prepared, and its answer."""
        _starts[self.run] = replace(instruction, ledger_rows=0, ledger_head="")
        try:
            worker = Worker(self.data, state=self.state, simulated=True, load=shared_site)
        except DataError:
            return None, _refuse(self.name, SiteUnfit())
        prepared = worker.prepare(instruction)
        return (worker if prepared.ok else None), prepared

    def _keep_warm(self, worker: Worker) -> None:
        _workers[self.state] = worker
        for state in list(_workers)[:-_WARM]:
            _workers.pop(state, None)


def _start_in(folder: Path) -> PrepareInstruction:
    """What the run in `folder` sends its sites."""
    initial = to_arrays(starting_parameters(folder))
    return PrepareInstruction(plan_json=run_plan(folder).to_json(), signer="", signature="", initial=initial)


class SharedSites:
    """Sites' images, read once in this process for all federations and evaluations of a study, and never written."""

    def __init__(self, *, most_bytes: int = _SHARED_BYTES) -> None:
        self._most_bytes = most_bytes
        self._known: dict[tuple[object, ...], SiteData] = {}  # the last used last
        self._bytes = 0
        self._lock = threading.Lock()

    def __call__(self, folder: Path, plan: StudyPlan, *, site: str, split: str | None = None) -> SiteData:
        """`load_site`, the newest `most_bytes` of it from memory. A site is read anew if a file directly in its folder
        (site.yaml, manifest, npz) changed."""
        spec = plan.sites[site].model_dump_json() if site in plan.sites else ""
        files = sorted((file.name, file.stat().st_mtime_ns) for file in folder.iterdir() if file.is_file())
        key = (folder, site, plan.task.model_dump_json(), spec, *files)
        with self._lock:
            data = self._taken(key)
        if data is None:
            data = load_site(folder, plan, site=site)
        with self._lock:
            self._taken(key)  # another thread may have read it, too
            self._known[key] = data
            self._bytes += _bytes(data)
            while self._bytes > self._most_bytes:
                self._taken(next(iter(self._known)))
        return data if split is None else data.of_split(split)

    def _taken(self, key: tuple[object, ...]) -> SiteData | None:
        data = self._known.pop(key, None)
        self._bytes -= 0 if data is None else _bytes(data)
        return data


def _bytes(data: SiteData) -> int:
    return data.images.nbytes + (0 if data.masks is None else data.masks.nbytes) + _ROW_BYTES * len(data)


shared_site = SharedSites()


def _refuse(site: str, refusal: Refusal) -> SiteReply:
    return SiteReply(site=site, code=refusal.code, reason=refusal.public_reason)


@dataclass(frozen=True)
class SimulatedData:
    """One site's images on the researcher's machine, in memory when they are looked at."""

    folder: Path
    plan: StudyPlan
    site: str
    phantom: bool

    @property
    def rows(self) -> SiteData:
        """Raises DataError."""
        return shared_site(self.folder, self.plan, site=self.site)

    def measurable(self, kind: Kind, where: RowFilter | None = None) -> bool:
        """Whether there is enough for a support and a query set."""
        return objection_to(self.evaluated(kind, where)) is None

    def evaluated(self, kind: Kind, where: RowFilter | None = None) -> SiteData:
        """What is measured on: all of a held-out site, the patients who never train of a training site; of them those
        that match."""
        rows = self.rows
        chosen = rows.of_split("test") if kind == "held-out patients" else rows
        return chosen if where is None else chosen.matching(where)

    def examples(self, per_label: int) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
        """(label, uint8 (H, W) or (H, W, 3), mask): the first images of each label; of a segmentation, of its last."""
        rows = self.rows
        labels = list(enumerate(rows.label_names))
        if rows.kind == "segmentation":
            labels = [(0, rows.label_names[-1])]
        for label, name in labels:
            shown = rows.labels[:, label] > 0 if rows.labels.dim() == 2 else rows.labels == label
            for index in shown.nonzero().flatten()[:per_label].tolist():
                mask = None if rows.masks is None else rows.masks[index].numpy()
                yield name, picture(rows, index), mask


def picture(rows: SiteData, row: int) -> np.ndarray:
    """uint8 (H, W) or (H, W, 3)."""
    image: np.ndarray = rows.images[row].permute(1, 2, 0).numpy()
    return image[..., 0] if image.shape[2] == 1 else image


def load_simulated(folder: Path, plan: StudyPlan, site: str) -> SimulatedData:
    """A site's images, fitted to the plan. Raises DataError with every problem of its files."""
    data = SimulatedData(folder, plan, site, load_site_config(folder).phantom)
    data.rows  # noqa: B018  # or refuse
    return data


def load_public(folder: Path, plan: StudyPlan) -> PublicSet:
    """A public data set in the form of a site folder, fitted to the plan's image size. Raises DataError."""
    data = load_images(folder, image_size=plan.task.image_size, channels=plan.task.channels)
    number = {name: index for index, name in enumerate(plan.task.modalities)}
    return PublicSet(
        name=data.site,
        images=data.images,
        labels=data.labels,
        label_names=data.label_names,
        patients=data.patients,
        masks=data.masks,
        modalities=torch.tensor([number.get(row.modality, -1) for row in data.details]) if number else None,
        free=load_site_config(folder).orientation == "free",
    )


def evaluate_start(
    start: Params | None, rows: SiteData, plan: StudyPlan, *, arm: str, kind: Kind, target: str
) -> list[Trial]:
    """Few-shot adaptation from `start` to a site's rows; None is a random initialization."""
    return few_shot_trials(start, rows, plan, arm=arm, kind=kind, seed=plan.seed, target=target)


def evaluate_ceiling(start: Params, rows: SiteData, plan: StudyPlan, *, kind: Kind, target: str) -> list[Trial]:
    """The same network trained on all support patients."""
    return ceiling_trials(start, rows, plan, kind=kind, seed=plan.seed, target=target)


def personal_parameters(folder: Path, site: str) -> Params:
    """What the run in `folder` left at a site of its own model (MR-MTL); nothing for other algorithms."""
    plan = run_plan(folder)
    kept = ReleaseStore(folder / "sites" / site / "releases" / plan.digest).kept_before(plan.rounds + 1) or {}
    return {name.removeprefix(PERSONAL): value for name, value in kept.items() if name.startswith(PERSONAL)}


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
                patients=_phantom_patients(
                    site.patients,
                    ways=len(PROFILES[name].labels),
                    healthy_only=plan.task.kind == "anomaly" and site.role == "train",
                ),
                image_size=plan.task.image_size,
                channels=plan.task.channels,
                seed=plan.seed,
                test_fraction=_PHANTOM_TEST_SHARE,
            )
    return site_folders(root)


def _phantom_patients(training: int, *, ways: int, healthy_only: bool) -> int:
    """The fewest patients of which, label by label, `training` (healthy) ones are left when the test share is taken."""

    def left(total: int) -> int:
        of_label = [len(range(label, total, ways)) for label in range(1 if healthy_only else ways)]
        return sum(count - min(max(round(_PHANTOM_TEST_SHARE * count), 1), count - 1) for count in of_label if count)

    return next(total for total in itertools.count(training) if left(total) >= training)
