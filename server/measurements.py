"""Starts tried at targets: each measurement is done once, kept on disk, and independent of every other."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import write_atomically
from common.params import Params
from common.plan import StudyPlan
from common.processes import process_pool
from common.timing import timed
from common.trials import CEILING, Kind, Trial
from server.simulation import SiteData, evaluate_ceiling, evaluate_start


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One start at one target; `path` keeps its trials."""

    path: Path
    arm: str
    kind: Kind
    plan: StudyPlan
    target: str  # its name in the report
    rows: SiteData
    start: Params | None  # None: a random initialization

    @property
    def title(self) -> str:
        return f"{self.arm} at {self.target}"


@timed("evaluation")
def measure(measurement: Measurement) -> list[Trial]:
    """The measurement's trials, from disk if they are there."""
    if measurement.path.exists():
        return [_trial(fields) for fields in json.loads(measurement.path.read_text())]
    plan, rows, kind, start = measurement.plan, measurement.rows, measurement.kind, measurement.start
    if measurement.arm == CEILING and start is not None:
        trials = evaluate_ceiling(start, rows, plan, kind=kind, target=measurement.target)
    else:
        trials = evaluate_start(start, rows, plan, arm=measurement.arm, kind=kind, target=measurement.target)
    write_atomically(measurement.path, json.dumps([_fields(trial) for trial in trials], allow_nan=False).encode())
    return trials


def measure_all(measurements: Sequence[Measurement], *, jobs: int) -> Iterator[list[Trial]]:
    """The trials of each measurement, in order; `jobs` processes at once."""
    if jobs == 1:
        yield from map(measure, measurements)
        return
    with process_pool(jobs, preload=__name__, torch_threads=1) as pool:
        try:
            yield from pool.map(measure, measurements)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fields(trial: Trial) -> dict[str, Any]:
    metrics = {name: None if math.isnan(value) else value for name, value in trial.metrics.items()}
    return dataclasses.asdict(trial) | {"metrics": metrics}


def _trial(fields: dict[str, Any]) -> Trial:
    metrics = {name: math.nan if value is None else value for name, value in fields["metrics"].items()}
    return Trial(**fields | {"metrics": metrics})
