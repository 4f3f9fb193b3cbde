"""`consilium-lab run`: a signed study, given to the lab's server and followed to its report.

The study runs in the server: whoever follows it may leave and come back. If the ServerApp was killed, following it
starts another, which goes on after the last committed round.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from common.checkpoint import save_checkpoint
from common.errors import Problem, RunError, UsageError
from common.files import write_atomically
from common.plan import StudyPlan
from common.service import running_instance
from server.flower import BUNDLE, Control
from server.history import RoundRecord
from server.lab import Lab
from server.observer import Observer
from server.orders import (
    SIGNED,
    START,
    Order,
    forget_outcome,
    order_of,
    ordered_plan,
    outcome_of,
    sign_study,
    write_order,
    write_outcome,
)
from server.report import write_metrics, write_report
from server.results import META, Federation, StudyResults, versions
from server.run_folder import run_history
from server.serving import SERVICE
from server.start import initial_parameters
from server.study import check_study

METRICS, REPORT = "metrics.json", "report.html"

_LOOK_S, _ASK_S = 0.5, 3.0  # at the run folder; at the SuperLink
_MOST_STARTS = 10  # of a ServerApp that commits nothing in between
_PATIENCE_S = 90.0  # with a SuperLink that is being started again


def run_study(lab: Lab, file: Path, *, wait_s: float, observer: Observer, stop: threading.Event) -> Path | None:
    """Order the study in `file`, or go on with it, and follow it to its report; None if `stop` was set before.

    Raises PlanError, UsageError, CheckpointError; RunError if it cannot go on, or the lab does not serve.
    """
    checked = check_study(file)
    _require_served(lab)
    folder = place_order(lab, checked.plan, file.parent, wait_s=wait_s)
    if outcome_of(folder) != "":
        forget_outcome(folder)
        _start(lab, folder)
    if not _follow(lab, folder, checked.plan, observer, stop):
        return None
    return write_run_report(folder, sentences=checked.sentences)


def place_order(lab: Lab, plan: StudyPlan, plan_folder: Path, *, wait_s: float) -> Path:
    """The folder of the study's run, with everything that the ServerApp needs; the same study goes on where it stands.

    Raises UsageError if another plan ran under this name, CheckpointError for the warm start.
    """
    folder = lab.runs / plan.study
    if (folder / SIGNED).exists():
        known = ordered_plan(folder)
        if known.digest != plan.digest:
            what = f"another plan was run as {plan.study!r} (digest {known.digest[:12]}, not {plan.digest[:12]})"
            raise UsageError(Problem(str(folder), what, "give the changed study another name"))
    else:
        save_checkpoint(folder / START, initial_parameters(plan, plan_folder), {})
        write_atomically(folder / SIGNED, sign_study(lab, plan).to_json().encode())
    before = order_of(folder)
    write_order(folder, replace(before, wait_s=wait_s) if before else Order(wait_s))
    return folder


def write_run_report(folder: Path, *, sentences: tuple[str, ...] = ()) -> Path:
    """report.html and metrics.json of the run in `folder`, as far as it is."""
    results = StudyResults(
        plan=ordered_plan(folder),
        trials=[],
        federations=[Federation(arm=META, records=run_history(folder))],
        sentences=sentences,
        versions=versions(),
        at_hospitals=True,
    )
    write_metrics(folder / METRICS, results)
    write_report(folder / REPORT, results)
    return folder / REPORT


def stop_study(lab: Lab, name: str) -> None:
    """End the study's run; what is committed stays. Raises UsageError if there is none."""
    folder = lab.runs / name
    order = order_of(folder)
    if order is None or order.flower_run is None:
        raise UsageError(Problem(f"study {name}", "was not run here", "`consilium-lab status` lists the studies"))
    if outcome_of(folder) is not None:
        return
    write_outcome(folder, "it was stopped by the lab")
    with Control(lab) as control:
        run = control.run(order.flower_run)
        if run is not None and not run.ended:
            control.stop(run.id)


def _require_served(lab: Lab) -> None:
    if running_instance(lab.folder, SERVICE) is None:
        raise RunError(str(Problem(str(lab.folder), "the lab does not serve", "start `consilium-lab serve` first")))


def _start(lab: Lab, folder: Path) -> None:
    """Give the study to the SuperLink, unless it has it."""
    order = order_of(folder)
    if order is None:
        raise UsageError(Problem(str(folder), "holds no ordered study", "`consilium-lab run` makes one"))
    with Control(lab) as control:
        _await_superlink(control)
        known = None if order.flower_run is None else control.run(order.flower_run)
        if known is None or known.ended:
            write_order(folder, replace(order, flower_run=control.submit(BUNDLE, **{"run-folder": str(folder)})))


def _await_superlink(control: Control) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            control.nodes()
            return
        except RunError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1.0)


@dataclass
class _Progress:
    """How far the follower has read."""

    told: int = 0  # records
    starts: int = 1
    asked: float = 0.0


def _follow(lab: Lab, folder: Path, plan: StudyPlan, observer: Observer, stop: threading.Event) -> bool:
    """Tell `observer` each round as it is committed, and start the ServerApp again if it was killed; True at the end.

    Raises RunError with the ServerApp's own error.
    """
    progress = _Progress(told=0, asked=time.monotonic())
    observer.run_started(study=plan.study, done=max(len(run_history(folder)) - 1, 0), rounds=plan.rounds)
    progress.told = len(run_history(folder)) if (folder / "plan.json").exists() else 0
    while True:
        error = outcome_of(folder)
        for record in run_history(folder)[progress.told :]:
            _tell(observer, record)
            progress.told += 1
            progress.starts = 1
        if error is not None:
            if error:
                raise RunError(f"study {plan.study}: {error}")
            return True
        if time.monotonic() - progress.asked >= _ASK_S:
            progress.asked = time.monotonic()
            _tend(lab, folder, progress)
        if stop.wait(_LOOK_S):
            return False


def _tell(observer: Observer, record: RoundRecord) -> None:
    if record.round == 0:
        observer.sites_prepared(record.sites)
    observer.round_committed(record)


def _tend(lab: Lab, folder: Path, progress: _Progress) -> None:
    """Another ServerApp, if the last one ended without a word."""
    order = order_of(folder)
    try:
        with Control(lab) as control:
            run = None if order is None or order.flower_run is None else control.run(order.flower_run)
    except RunError:
        _require_served(lab)
        return  # the SuperLink is being started again
    if (run is None or run.ended) and outcome_of(folder) is None:
        if progress.starts >= _MOST_STARTS:
            raise RunError(f"the ServerApp ended {progress.starts} times without a round; see {lab.superlink}/*.log")
        progress.starts += 1
        _start(lab, folder)
