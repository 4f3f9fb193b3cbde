"""What a site's folder holds, and everything that is wrong with it; needs no network, no torch, no lab."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from client.data.intake import Target, count_problems, fit_rows, plan_target, read_rows
from client.data.rows import Row, refuse
from client.site import SiteConfig, load_site_config
from common.errors import Problem, UsageError
from common.plan import StudyPlan


@dataclass(frozen=True)
class Count:
    """How much of one label is in one split."""

    label: str
    split: str
    images: int
    patients: int


@dataclass(frozen=True)
class SiteReport:
    """The counts over all usable rows, notes, and the problems of the others."""

    folder: Path
    site: str
    counts: tuple[Count, ...] = ()
    images: int = 0
    patients: int = 0
    training_patients: int = 0
    images_per_patient: tuple[int, float, int] = (0, 0.0, 0)  # fewest, mean, most
    masks: int = 0
    notes: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()

    @property
    def fit(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, object]:
        """Plain values, with `fit` beside the fields."""
        return {**dataclasses.asdict(self), "folder": str(self.folder), "fit": self.fit}


def check_site(folder: Path, plan: StudyPlan | None = None, *, site: str | None = None) -> SiteReport:
    """Read every image of `folder`, fit it to `plan` if given, and report; never raises for what a site can mend."""
    try:
        config = load_site_config(folder)
    except UsageError as error:
        return SiteReport(folder, site or folder.name, problems=error.problems)
    name = site or config.name
    try:
        target = plan_target(folder, plan, name) if plan else None
    except UsageError as error:
        return SiteReport(folder, name, problems=error.problems)
    return _report(folder, config, name, target)


def describe(folder: Path) -> SiteReport:
    """The counts of a sound site folder.

    Raises DataError if it is not sound.
    """
    report = check_site(folder)
    refuse(list(report.problems))
    return report


def _report(folder: Path, config: SiteConfig, name: str, target: Target | None) -> SiteReport:
    problems: list[Problem] = []
    rows = read_rows(folder, config, problems)
    seen = [_without_pixels(row) for row in (fit_rows(rows, target, problems) if target else rows)]
    per_patient = Counter(row.patient for row in seen)
    training = len({row.patient for row in seen if row.split == "train"})
    spread = per_patient.values()
    return SiteReport(
        folder,
        name,
        _counts(seen),
        len(seen),
        len(per_patient),
        training,
        (min(spread), round(len(seen) / len(spread), 2), max(spread)) if seen else (0, 0.0, 0),
        sum(row.masked for row in seen),
        _notes(config, per_patient),
        tuple(problems or count_problems(folder, len(seen), training, target)),
    )


@dataclass(frozen=True)
class _Seen:
    label: str
    patient: str
    split: str
    masked: bool


def _without_pixels(row: Row) -> _Seen:
    return _Seen(row.label, row.patient, row.split, row.mask is not None and bool(row.mask.any()))


def _counts(seen: Iterable[_Seen]) -> tuple[Count, ...]:
    groups: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for row in seen:
        groups[row.label, row.split].append(row.patient)
    return tuple(Count(*key, len(patients), len(set(patients))) for key, patients in sorted(groups.items()))


def _notes(config: SiteConfig, per_patient: Counter[str]) -> tuple[str, ...]:
    notes = []
    if config.phantom:
        notes.append("PHANTOM: images drawn by a program, no patient's")
    if per_patient and max(per_patient.values()) == 1:
        notes.append("each image counts as a patient of its own: true only if nobody was imaged twice")
    return tuple(notes)
