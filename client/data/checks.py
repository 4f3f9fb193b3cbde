"""What a site's folder holds, and everything that is wrong with it; needs no network, no torch, no lab."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from client.data.intake import Target, count_problems, fit_rows, plan_target, read_rows
from client.data.rows import Details, Row, refuse
from client.site import SiteConfig, load_site_config
from common.disclosure import coarse
from common.errors import Problem, UsageError
from common.findings import NO_FINDING, findings_in
from common.plan import StudyPlan, TaskKind


@dataclass(frozen=True)
class Count:
    """How much of one label is in one split; an image that shows several counts for each."""

    label: str  # of a mask: what is marked, or the background where nothing is
    split: str
    images: int
    patients: int


@dataclass(frozen=True)
class SiteReport:
    """The counts over all usable rows, notes, and the problems of the others."""

    folder: Path
    site: str
    kind: TaskKind = "classification"  # of the plan's task
    counts: tuple[Count, ...] = ()
    images: int = 0
    patients: int = 0
    training_patients: int = 0
    images_per_patient: tuple[int, float, int] = (0, 0.0, 0)  # fewest, mean, most
    masks: int = 0  # images that have one, be it black
    modalities: dict[str, int] = field(default_factory=dict)  # images of each, "" where it is not known
    sexes: dict[str, int] = field(default_factory=dict)
    scanners: dict[str, int] = field(default_factory=dict)
    ages: tuple[float, float] | None = None  # years: youngest, oldest; None if none is known
    notes: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    suspicions: tuple[Problem, ...] = ()  # to be looked at by a person; they stop nothing

    @property
    def fit(self) -> bool:
        return not self.problems

    @property
    def counted(self) -> str:
        """What the counts are of."""
        return {"multilabel": "finding", "segmentation": "marked"}.get(self.kind, "label")

    def known_details(self, number: Callable[[int], str]) -> Iterator[str]:
        """One line for each detail that is known of some image; `number` writes a count."""
        for title, tally in (("modality", self.modalities), ("sex", self.sexes), ("scanner", self.scanners)):
            if tally:
                counts = ", ".join(f"{name or 'not known'} {number(count)}" for name, count in tally.items())
                yield f"{title}: {counts}"
        if self.ages:
            yield "age: {:g} to {:g} years".format(*self.ages)

    def to_json(self) -> dict[str, object]:
        """Plain values, with `fit` beside the fields."""
        return {**dataclasses.asdict(self), "folder": str(self.folder), "fit": self.fit}


def coarsened(report: SiteReport) -> SiteReport:
    """What of a report may be shown outside the hospital: counts by `common.disclosure`, ages in tens, no extremes.

    Labels, splits and details that fewer than ten patients or images have stay listed, with a count of 0.
    """
    ages = report.ages
    return dataclasses.replace(
        report,
        counts=tuple(Count(c.label, c.split, coarse(c.images), coarse(c.patients)) for c in report.counts),
        images=coarse(report.images),
        patients=coarse(report.patients),
        training_patients=coarse(report.training_patients),
        images_per_patient=(0, round(report.images_per_patient[1]), 0),
        masks=coarse(report.masks),
        modalities={name: coarse(count) for name, count in report.modalities.items()},
        sexes={name: coarse(count) for name, count in report.sexes.items()},
        scanners={name: coarse(count) for name, count in report.scanners.items()},
        ages=(10 * math.floor(ages[0] / 10), 10 * math.ceil(ages[1] / 10)) if ages else None,
    )


def check_site(
    folder: Path, plan: StudyPlan | None = None, *, site: str | None = None, look: Sequence[Callable[[Row], None]] = ()
) -> SiteReport:
    """Read every image of `folder`, fit it to `plan` if given, and report; never raises for what a site can mend.

    Each of `look` is shown every row that can be read, before it is fitted.
    """
    try:
        config = load_site_config(folder)
    except UsageError as error:
        return SiteReport(folder, site or folder.name, problems=error.problems)
    name = site or config.name
    try:
        target = plan_target(folder, plan, name) if plan else None
    except UsageError as error:
        return SiteReport(folder, name, problems=error.problems)
    return _report(folder, config, name, target, look)


def describe(folder: Path) -> SiteReport:
    """The counts of a sound site folder.

    Raises DataError if it is not sound.
    """
    report = check_site(folder)
    refuse(list(report.problems))
    return report


def _report(
    folder: Path, config: SiteConfig, name: str, target: Target | None, look: Sequence[Callable[[Row], None]]
) -> SiteReport:
    problems: list[Problem] = []
    rows = _looked_at(read_rows(folder, config, problems, target), look)
    seen = [_without_pixels(row, target) for row in (fit_rows(rows, target, problems) if target else rows)]
    per_patient = Counter(row.patient for row in seen)
    training = len({row.patient for row in seen if row.split == "train"})
    spread = per_patient.values()
    details = [row.details for row in seen]
    return SiteReport(
        folder,
        name,
        kind=target.kind if target else "classification",
        counts=_counts(seen),
        images=len(seen),
        patients=len(per_patient),
        training_patients=training,
        images_per_patient=(min(spread), round(len(seen) / len(spread), 2), max(spread)) if seen else (0, 0.0, 0),
        masks=sum(row.masked for row in seen),
        modalities=_tally(known.modality for known in details),
        sexes=_tally(known.sex for known in details),
        scanners=_tally(known.scanner for known in details),
        ages=_age_range(details),
        notes=_notes(config, per_patient),
        problems=tuple(problems or count_problems(folder, len(seen), training, target)),
    )


def _looked_at(rows: Iterator[Row], look: Sequence[Callable[[Row], None]]) -> Iterator[Row]:
    for row in rows:
        for see in look:
            see(row)
        yield row


@dataclass(frozen=True)
class _Seen:
    labels: tuple[str, ...]
    patient: str
    split: str
    masked: bool
    details: Details


def _without_pixels(row: Row, target: Target | None) -> _Seen:
    return _Seen(_shown(row, target), row.patient, row.split, row.mask is not None, row.details)


def _shown(row: Row, target: Target | None) -> tuple[str, ...]:
    """What an image counts for."""
    if target is None or target.labels is None or target.kind in ("classification", "anomaly"):
        return (row.label,)
    if target.kind == "multilabel":
        return tuple(dict.fromkeys(findings_in(row.label))) or (NO_FINDING,)
    marked = np.unique(row.mask[row.mask > 0]) if row.mask is not None else ()
    return tuple(target.labels[value] for value in marked) or target.labels[:1]


def _counts(seen: Iterable[_Seen]) -> tuple[Count, ...]:
    groups: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for row in seen:
        for label in row.labels:
            groups[label, row.split].append(row.patient)
    return tuple(Count(*key, len(patients), len(set(patients))) for key, patients in sorted(groups.items()))


def _tally(values: Iterable[str]) -> dict[str, int]:
    """How often each occurs; empty if nothing is known."""
    tally = dict(sorted(Counter(values).items()))
    return tally if any(tally) else {}


def _age_range(details: Sequence[Details]) -> tuple[float, float] | None:
    ages = [known.age for known in details if not math.isnan(known.age)]
    return (min(ages), max(ages)) if ages else None


def _notes(config: SiteConfig, per_patient: Counter[str]) -> tuple[str, ...]:
    notes = []
    if config.phantom:
        notes.append("PHANTOM: images drawn by a program, no patient's")
    if per_patient and max(per_patient.values()) == 1:
        notes.append("each image counts as a patient of its own: true only if nobody was imaged twice")
    return tuple(notes)
