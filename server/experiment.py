"""A simulated study from plan to report: which federations run, what is measured at whom, what is written.

    RUN/plan.json                       the study; another one is refused
    RUN/federations/FOLD/ARM/           a run folder of its own, with its own ledgers, for every federation
    RUN/trials/FOLD/TARGET/ARM.json     few-shot trials, kept so that a resumed study does not repeat them
    RUN/metrics.json  RUN/report.html

A fold is the study itself ("all"), or the study without one hospital. An arm is what an adaptation starts from.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from common.accounting import queries_per_round
from common.errors import DataError, Problem, UsageError
from common.files import write_atomically
from common.metrics import lead_metric
from common.params import Params
from common.plan import OuterSpec, RowFilter, StudyPlan, plan_from_json
from common.plan_rules import UNSCORED
from common.trials import CEILING, RANDOM, Kind, Trial, mean
from server.measurements import Measurement, measure_all
from server.observer import Observer
from server.report import write_metrics, write_report
from server.results import META, CurvePoint, Example, Federation, Picture, StudyResults, versions
from server.run_folder import final_parameters, run_history
from server.simulation import (
    Engine,
    SimulatedData,
    SiteData,
    draw_phantoms,
    load_simulated,
    personal_parameters,
    picture,
    run_federation,
    sights,
    site_folders,
)
from server.simulation import Federation as Simulated
from server.start import initial_parameters
from server.study import check_study
from server.summary import WITHOUT_PRIVACY

PLAN, METRICS, REPORT = "plan.json", "metrics.json", "report.html"
_EXAMPLES_PER_LABEL, _EXAMPLE_SITES = 2, 40
_PICTURED_TARGETS, _PICTURES = 2, 3  # targets; images of each


class Watcher(Observer, Protocol):
    """Told how far the whole study is."""

    def remarked(self, remark: str) -> None:
        """Something is wrong with a site; the study goes on without it."""
        ...

    def study_started(self, *, rounds: int) -> None:
        """How many rounds there are over all federations."""
        ...

    def federation_started(self, title: str) -> None: ...

    def evaluations_started(self, evaluations: int) -> None:
        """How many starts are to be tried at how many targets, all in all."""
        ...

    def evaluation_finished(self, title: str) -> None: ...


@dataclass(frozen=True)
class Arm:
    """What an adaptation starts from; `plan` runs as a federation if its algorithm asks anything."""

    name: str
    plan: StudyPlan

    @property
    def learns(self) -> bool:
        return queries_per_round(self.plan) > 0


@dataclass(frozen=True)
class Target:
    """Whom starts are measured at: new patients of a site, or those of them in a subgroup of the plan."""

    site: str
    kind: Kind
    subgroup: str | None = None

    @property
    def name(self) -> str:
        return f"{self.site}/{self.subgroup}" if self.subgroup else self.site


@dataclass(frozen=True)
class Fold:
    """The study, or the study without one of its hospitals; and at whom its starts are measured."""

    left_out: str | None
    arms: tuple[Arm, ...]
    targets: tuple[Target, ...]

    @property
    def name(self) -> str:
        return f"without-{self.left_out}" if self.left_out else "all"


@dataclass(frozen=True)
class Experiment:
    """Everything that a simulated study needs; `out` is its run folder."""

    plan: StudyPlan
    plan_folder: Path  # its warm start is relative to this
    site_folders: Mapping[str, Path]
    data: Mapping[str, SimulatedData]  # of the sites whose files are good
    remarks: tuple[str, ...]  # what is wrong with the others
    sentences: tuple[str, ...]  # the plan in words
    out: Path

    def folds(self) -> Iterator[Fold]:
        """The study first, then each hospital left out."""
        new = self._measurable(self.plan.held_out_sites, "held-out site")
        patients = self._measurable(self.plan.training_sites, "held-out patients")
        yield Fold(None, arms_of(self.plan), (*new, *patients))
        for name in self.plan.evaluation.leave_one_out:
            if name in self.plan.training_sites:
                yield Fold(name, arms_of(without_site(self.plan, name)), self._measurable((name,), "held-out site"))

    def _measurable(self, names: Iterable[str], kind: Kind) -> tuple[Target, ...]:
        """Those that have enough images, each whole and by subgroup."""
        targets = [
            Target(name, kind, subgroup)
            for name in names
            if name in self.data
            for subgroup in (None, *self.plan.evaluation.subgroups)
        ]
        return tuple(t for t in targets if self.data[t.site].measurable(kind, self._where(t)))

    def rows(self, target: Target) -> SiteData:
        """What is measured on."""
        return self.data[target.site].evaluated(target.kind, self._where(target))

    def _where(self, target: Target) -> RowFilter | None:
        return self.plan.evaluation.subgroups[target.subgroup] if target.subgroup else None

    def folder(self, fold: Fold, arm: Arm) -> Path:
        return self.out / "federations" / fold.name / _file_name(arm.name)


def simulate_study(
    file: Path, sites: Path | None, out: Path, *, watcher: Watcher, engine: Engine, resume: bool, jobs: int
) -> StudyResults:
    """A whole simulation: check the plan, open the sites below `sites` (or draw phantoms), run, report.

    Raises PlanError, DataError, UsageError, CheckpointError or RunError.
    """
    processors = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    torch.set_num_threads(max(1, processors // jobs))  # more threads than cores are far slower than one
    checked = check_study(file)
    claim(checked.plan, out, resume=resume)
    folders = draw_phantoms(checked.plan, out / "sites") if sites is None else site_folders(sites)
    experiment = open_experiment(checked.plan, file.parent, folders, out, sentences=tuple(checked.sentences))
    return run_experiment(experiment, watcher=watcher, engine=engine, jobs=jobs)


def open_experiment(
    plan: StudyPlan, plan_folder: Path, site_folders: Mapping[str, Path], out: Path, *, sentences: tuple[str, ...]
) -> Experiment:
    """Load every site of the plan that has a folder; a site whose files are bad is named and left aside.

    Raises UsageError if too few training sites are good, CheckpointError for the warm start.
    """
    data, remarks = {}, []
    for name, site in plan.sites.items():
        if name not in site_folders:
            remarks.append(f"{name}: there is no folder of this site")
            continue
        try:
            data[name] = load_simulated(site_folders[name], plan, name)
        except DataError as error:
            remarks += [f"{name}: {problem}" for problem in error.problems]
            continue
        if site.role == "held_out" and not data[name].measurable("held-out site"):
            remarks.append(f"{name}: too few patients or labels, so nothing is measured there")
    good = [name for name in plan.training_sites if name in data]
    if len(good) < plan.quorum:
        what = f"only {len(good)} training sites can be used, and the quorum is {plan.quorum}"
        raise UsageError(
            [Problem(f"study {plan.study}", what, "mend the sites below"), *(Problem("", r) for r in remarks)]
        )
    for arm in arms_of(plan):
        initial_parameters(arm.plan, plan_folder)  # a warm start that does not fit is told before anything runs
    return Experiment(plan, plan_folder, site_folders, data, tuple(remarks), sentences, out)


def run_experiment(experiment: Experiment, *, watcher: Watcher, engine: Engine, jobs: int) -> StudyResults:
    """Run every federation and evaluation that is not done yet, and write metrics.json and report.html.

    Raises RunError, or UsageError if a run folder in it holds another study.
    """
    began = time.monotonic()
    folds = list(experiment.folds())
    learning = [(fold, arm) for fold in folds for arm in fold.arms if arm.learns]
    for remark in experiment.remarks:
        watcher.remarked(remark)
    watcher.study_started(rounds=sum(arm.plan.rounds for _, arm in learning))
    for fold, arm in learning:
        watcher.federation_started(f"{arm.name}, {fold.name}")
        folder = experiment.folder(fold, arm)
        initial = initial_parameters(arm.plan, experiment.plan_folder)
        federation = Simulated(arm.plan, folder, dict(experiment.site_folders), initial)
        run_federation(federation, engine=engine, observer=watcher, resume=True, jobs=jobs)
    trained = time.monotonic()
    final = [measurement for fold in folds for measurement in _measurements(experiment, fold)]
    points = list(_curve_measurements(experiment, folds[0]))
    measurements = [*final, *(measurement for _, measurement in points)]
    watcher.evaluations_started(len(measurements))
    measured = []
    for measurement, done in zip(measurements, measure_all(measurements, jobs=jobs), strict=True):
        measured.append(done)
        watcher.evaluation_finished(measurement.title)
    trials = [trial for done in measured[: len(final)] for trial in done]
    tried = zip(points, measured[len(final) :], strict=True)
    curve = [_point(after, measurement, done) for (after, measurement), done in tried]
    seconds = {"federations": trained - began, "evaluation": time.monotonic() - trained}
    results = _results(experiment, folds, trials, curve, seconds)
    write_metrics(experiment.out / METRICS, results)
    write_report(experiment.out / REPORT, results)
    return results


def arms_of(plan: StudyPlan) -> tuple[Arm, ...]:
    """The study's own algorithm, what it is compared with, and both without privacy where the plan asks for it."""
    arms = [Arm(META, plan)]
    for other in plan.evaluation.compare:
        adaptation = other.adaptation or plan.evaluation.adaptation
        changed = _changed(
            plan,
            algorithm=other.algorithm(plan.algorithm),
            outer=other.outer or _weighable(plan.outer, other.name),
            model=other.model(plan.model),
            evaluation=plan.evaluation.model_copy(update={"adaptation": adaptation, "compare": []}),
        )
        arms.append(Arm(other.arm, changed))
    if plan.evaluation.without_privacy and plan.privacy is not None:
        arms += [Arm(arm.name + WITHOUT_PRIVACY, without_privacy(arm.plan)) for arm in arms if arm.learns]
    return tuple(arms)


def _weighable(outer: OuterSpec, algorithm: str) -> OuterSpec:
    """The study's outer step; an algorithm that leaves nothing to score cannot be weighed by score."""
    unscored = outer.weights == "score" and algorithm in UNSCORED
    return outer.model_copy(update={"weights": "equal"}) if unscored else outer


def without_site(plan: StudyPlan, name: str) -> StudyPlan:
    """The plan with the training site `name` held out."""
    sites = dict(plan.sites) | {name: plan.sites[name].model_copy(update={"role": "held_out"})}
    return _changed(plan, sites=sites, quorum=min(plan.quorum, len(plan.training_sites) - 1))


def without_privacy(plan: StudyPlan) -> StudyPlan:
    """The same study, protecting nobody. Weights by noise become weights by patients: there is none."""
    weights = "patients" if plan.outer.weights == "precision" else plan.outer.weights
    return _changed(plan, privacy=None, outer=plan.outer.model_copy(update={"weights": weights}))


def _changed(plan: StudyPlan, **changes: object) -> StudyPlan:
    """The plan with whole sections replaced, checked like any plan."""
    return plan_from_json(plan.model_copy(update=changes).to_json())


def claim(plan: StudyPlan, out: Path, *, resume: bool) -> None:
    """Mark the run folder as this study's. Raises UsageError if it holds something else, or is not to be resumed."""
    path = out / PLAN
    if not path.exists():
        if out.exists() and any(out.iterdir()):
            raise UsageError(Problem(str(out), "is not empty and holds no study", "take another folder"))
        write_atomically(path, plan.to_json().encode())
    elif path.read_text() != plan.to_json():
        raise UsageError(Problem(str(out), "this run folder holds another study", "take another folder, or its plan"))
    elif not resume:
        raise UsageError(
            Problem(
                str(out), "this run folder holds a run of this study", "go on with --resume, or take another folder"
            )
        )


def _measurements(experiment: Experiment, fold: Fold) -> Iterator[Measurement]:
    """A random initialization, the ceiling and every arm, at each of the fold's targets."""
    plans = {RANDOM: fold.arms[0].plan, CEILING: fold.arms[0].plan} | {arm.name: arm.plan for arm in fold.arms}
    for target in fold.targets:
        starts: dict[str, Params | None] = {RANDOM: None}
        if experiment.plan.evaluation.ceiling:
            starts[CEILING] = initial_parameters(experiment.plan, experiment.plan_folder)
        starts |= {arm.name: _start_of(experiment, fold, arm, target) for arm in fold.arms}
        for name, start in starts.items():
            yield _measurement(experiment, fold, target, name, plans[name], start)


def _measurement(
    experiment: Experiment, fold: Fold, target: Target, arm: str, plan: StudyPlan, start: Params | None, after: str = ""
) -> Measurement:
    return Measurement(
        path=_trials_path(experiment, fold, target, arm + after),
        arm=arm,
        kind=target.kind,
        plan=plan,
        target=target.name,
        rows=experiment.rows(target),
        start=start,
    )


def _curve_measurements(experiment: Experiment, fold: Fold) -> Iterator[tuple[int, Measurement]]:
    """(round, measurement): each learning arm after some of its rounds, at the held-out sites, with fewer draws."""
    evaluation = experiment.plan.evaluation
    few = evaluation.model_copy(update={"shots": [evaluation.lead_shots], "draws": 2})
    for arm in (arm for arm in fold.arms if arm.learns):
        for after in _spread(arm.plan.rounds, evaluation.curve_points):
            start = final_parameters(experiment.folder(fold, arm), round=after)
            for target in fold.targets:
                if target.kind == "held-out site" and target.subgroup is None:
                    plan = arm.plan.model_copy(update={"evaluation": few})
                    name = f" after {after}"
                    yield after, _measurement(experiment, fold, target, arm.name, plan, start, after=name)


def _start_of(experiment: Experiment, fold: Fold, arm: Arm, target: Target) -> Params:
    """What the arm learned; at a hospital that trained a model of its own, that model."""
    if not arm.learns:
        return initial_parameters(arm.plan, experiment.plan_folder)
    folder = experiment.folder(fold, arm)
    own = personal_parameters(folder, target.site) if target.kind == "held-out patients" else {}
    return final_parameters(folder) | own


def _trials_path(experiment: Experiment, fold: Fold, target: Target, name: str) -> Path:
    return experiment.out / "trials" / fold.name / target.name / f"{_file_name(name)}.json"


def _point(after: int, measurement: Measurement, trials: list[Trial]) -> CurvePoint:
    return CurvePoint(
        arm=measurement.arm,
        target=measurement.target,
        round=after,
        value=mean([trial.metrics[lead_metric(measurement.plan.task.kind)] for trial in trials]),
        shots=trials[0].shots,
    )


def _spread(rounds: int, points: int) -> list[int]:
    """`points` rounds from 0 to the last, evenly."""
    return sorted({round(i * rounds / max(1, points - 1)) for i in range(points)}) if points else []


def _results(
    experiment: Experiment, folds: list[Fold], trials: list[Trial], curve: list[CurvePoint], seconds: dict[str, float]
) -> StudyResults:
    federations = [
        Federation(arm=arm.name, records=run_history(experiment.folder(fold, arm)), left_out=fold.left_out)
        for fold in folds
        for arm in fold.arms
        if arm.learns
    ]
    examples = [
        Example(site=name, label=label, image=image, mask=mask)
        for name, data in list(experiment.data.items())[:_EXAMPLE_SITES]
        for label, image, mask in data.examples(_EXAMPLES_PER_LABEL)
    ]
    return StudyResults(
        plan=experiment.plan,
        trials=trials,
        federations=federations,
        curve=curve,
        sentences=experiment.sentences,
        examples=examples,
        pictures=_pictures(experiment, folds),
        phantoms=any(data.phantom for data in experiment.data.values()),
        versions=versions(),
        seconds=seconds,
        remarks=experiment.remarks,
    )


def _pictures(experiment: Experiment, folds: list[Fold]) -> list[Picture]:
    """What some starts make of query images at the first targets, where an answer can be looked at."""
    if experiment.plan.task.kind not in ("segmentation", "anomaly"):
        return []
    targets = [(fold, target) for fold in folds for target in fold.targets if target.subgroup is None]
    new_first = sorted(targets, key=lambda place: place[1].kind != "held-out site")
    pictures: list[Picture] = []
    for fold, target in new_first[:_PICTURED_TARGETS]:
        starts: list[tuple[str, StudyPlan, Params | None]] = [(RANDOM, fold.arms[0].plan, None)]
        starts += [(arm.name, arm.plan, _start_of(experiment, fold, arm, target)) for arm in fold.arms]
        for arm, plan, start in starts:
            pictures += _pictured(experiment, target, arm, plan, start)
    return pictures


def _pictured(
    experiment: Experiment, target: Target, arm: str, plan: StudyPlan, start: Params | None
) -> Iterator[Picture]:
    rows = experiment.rows(target)
    for sight in sights(start, rows, plan, count=_PICTURES, seed=plan.seed):
        label = rows.label_names[int(rows.labels[sight.row])] if plan.task.kind == "anomaly" else ""
        caption = f"{label}, more unusual than {sight.score:.0%} of the images" if label else ""
        truth = None if rows.masks is None else rows.masks[sight.row].numpy()
        found = None if sight.found is None else sight.found.numpy()
        if found is not None and plan.task.kind == "segmentation":
            found = found.astype("uint8")
        yield Picture(
            target=target.name,
            arm=arm,
            shots=plan.evaluation.lead_shots,
            image=picture(rows, sight.row),
            truth=truth,
            found=found,
            caption=caption,
        )


def _file_name(arm: str) -> str:
    return arm.replace(" ", "-")
