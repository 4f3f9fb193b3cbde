"""A simulated study from plan to report: which federations run, what is measured at whom, what is written.

    RUN/plan.json                       the study; another one is refused
    RUN/federations/FOLD/ARM/           a run folder of its own, with its own ledgers, for every federation
    RUN/trials/FOLD/TARGET/ARM.json     few-shot trials, kept so that a resumed study does not repeat them
    RUN/metrics.json  RUN/report.html

A fold is the study itself ("all"), or the study without one hospital. An arm is what an adaptation starts from.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from common.accounting import queries_per_round
from common.errors import DataError, Problem, UsageError
from common.files import write_atomically
from common.params import Params
from common.plan import StudyPlan, plan_from_json
from common.records import software_version
from common.trials import CEILING, RANDOM, Kind, Trial, mean
from server.measurements import Measurement, measure_all
from server.observer import Observer
from server.report import write_metrics, write_report
from server.results import META, CurvePoint, Example, Federation, StudyResults
from server.run_folder import final_parameters, run_history
from server.simulation import (
    Engine,
    SimulatedData,
    draw_phantoms,
    load_simulated,
    run_federation,
    site_folders,
)
from server.simulation import Federation as Simulated
from server.start import initial_parameters
from server.study import check_study
from server.summary import WITHOUT_PRIVACY

PLAN, METRICS, REPORT = "plan.json", "metrics.json", "report.html"
_EXAMPLES_PER_LABEL = 2
_LIBRARIES = ("flwr", "torch", "opacus", "dp-accounting")


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
class Fold:
    """The study, or the study without one of its hospitals; and at whom its starts are measured."""

    left_out: str | None
    arms: tuple[Arm, ...]
    targets: tuple[tuple[str, Kind], ...]

    @property
    def name(self) -> str:
        return f"without-{self.left_out}" if self.left_out else "all"


@dataclass(frozen=True)
class Experiment:
    """Everything that a simulated study needs; `out` is its run folder."""

    plan: StudyPlan
    initial: Params
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

    def _measurable(self, names: Iterable[str], kind: Kind) -> tuple[tuple[str, Kind], ...]:
        return tuple((name, kind) for name in names if name in self.data and self.data[name].measurable(kind))

    def folder(self, fold: Fold, arm: Arm) -> Path:
        return self.out / "federations" / fold.name / _file_name(arm.name)


def simulate_study(
    file: Path, sites: Path | None, out: Path, *, watcher: Watcher, engine: Engine, resume: bool, jobs: int
) -> StudyResults:
    """A whole simulation: check the plan, open the sites below `sites` (or draw phantoms), run, report.

    Raises PlanError, DataError, UsageError, CheckpointError or RunError.
    """
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))  # more threads than cores are far slower than one
    checked = check_study(file)
    _claim(checked.plan, out, resume=resume)
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
            remarks.append(f"{name}: fewer than two patients or two labels, so nothing is measured there")
    good = [name for name in plan.training_sites if name in data]
    if len(good) < plan.quorum:
        what = f"only {len(good)} training sites can be used, and the quorum is {plan.quorum}"
        raise UsageError(
            [Problem(f"study {plan.study}", what, "mend the sites below"), *(Problem("", r) for r in remarks)]
        )
    initial = initial_parameters(plan, plan_folder)
    return Experiment(plan, initial, site_folders, data, tuple(remarks), sentences, out)


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
        federation = Simulated(arm.plan, folder, dict(experiment.site_folders), experiment.initial)
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
        changed = _changed(plan, algorithm=other.algorithm(plan.algorithm), outer=other.outer or plan.outer)
        arms.append(Arm(other.name, changed))
    if plan.evaluation.without_privacy and plan.privacy is not None:
        arms += [Arm(arm.name + WITHOUT_PRIVACY, without_privacy(arm.plan)) for arm in arms if arm.learns]
    return tuple(arms)


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


def _claim(plan: StudyPlan, out: Path, *, resume: bool) -> None:
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
    starts: dict[str, Params | None] = {RANDOM: None, CEILING: experiment.initial}
    starts |= {arm.name: _start_of(experiment, fold, arm) for arm in fold.arms}
    plans = {arm.name: arm.plan for arm in fold.arms}
    for target, kind in fold.targets:
        for name, start in starts.items():
            yield Measurement(
                path=_trials_path(experiment, fold, target, name),
                arm=name,
                kind=kind,
                plan=plans.get(name, fold.arms[0].plan),
                data=experiment.data[target],
                start=start,
            )


def _curve_measurements(experiment: Experiment, fold: Fold) -> Iterator[tuple[int, Measurement]]:
    """(round, measurement): each learning arm after some of its rounds, at the held-out sites, with fewer draws."""
    evaluation = experiment.plan.evaluation
    few = evaluation.model_copy(update={"shots": [evaluation.lead_shots], "draws": 2})
    for arm in (arm for arm in fold.arms if arm.learns):
        for after in _spread(arm.plan.rounds, evaluation.curve_points):
            start = final_parameters(experiment.folder(fold, arm), round=after)
            for target, kind in fold.targets:
                if kind == "held-out site":
                    yield (
                        after,
                        Measurement(
                            path=_trials_path(experiment, fold, target, f"{arm.name} after {after}"),
                            arm=arm.name,
                            kind=kind,
                            plan=arm.plan.model_copy(update={"evaluation": few}),
                            data=experiment.data[target],
                            start=start,
                        ),
                    )


def _start_of(experiment: Experiment, fold: Fold, arm: Arm) -> Params:
    return final_parameters(experiment.folder(fold, arm)) if arm.learns else experiment.initial


def _trials_path(experiment: Experiment, fold: Fold, target: str, name: str) -> Path:
    return experiment.out / "trials" / fold.name / target / f"{_file_name(name)}.json"


def _point(after: int, measurement: Measurement, trials: list[Trial]) -> CurvePoint:
    return CurvePoint(
        arm=measurement.arm,
        target=measurement.data.rows.site,
        round=after,
        balanced_accuracy=mean([trial.metrics["balanced_accuracy"] for trial in trials]),
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
        Example(site=name, label=label, image=image)
        for name, data in experiment.data.items()
        for label, image in data.examples(_EXAMPLES_PER_LABEL)
    ]
    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return StudyResults(
        plan=experiment.plan,
        trials=trials,
        federations=federations,
        curve=curve,
        sentences=experiment.sentences,
        examples=examples,
        phantoms=any(data.phantom for data in experiment.data.values()),
        versions={"consilium": software_version(), "python": platform.python_version(), **versions},
        seconds=seconds,
        remarks=experiment.remarks,
    )


def _file_name(arm: str) -> str:
    return arm.replace(" ", "-")
