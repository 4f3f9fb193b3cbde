"""Everything that a study's report is made of, and what may be said of it in a sentence."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from common.algorithms import ALGORITHMS
from common.metrics import lead_metric, metrics_of
from common.plan import StudyPlan, TaskKind
from common.plan_in_words import algorithm_title, arm_titles
from common.records import software_version
from common.trials import CEILING, RANDOM, Estimate, Kind, Trial, shots_unit
from server.history import RoundRecord
from server.summary import WITHOUT_PRIVACY, Row, summarise

_LIBRARIES = ("flwr", "torch", "opacus", "dp-accounting")

META = "meta"  # arm: what the study's own algorithm learned
UNPROTECTED = "WITHOUT PRIVACY: a simulation that protects no patient"
PHANTOMS = "PHANTOMS: the images were drawn by a program; no figure here says anything about patients"

_TITLES = {RANDOM: "Random initialization", CEILING: "Ceiling (all support patients)"}
_SHORT_TITLES = {"local_only": "warm start", "fedavg": "averaging"}
_LEADS = {"balanced_accuracy": ("a", "balanced accuracy"), "dice": ("a", "Dice score"), "auroc": ("an", "AUROC")}
_AGAINST = ("random initialization", "federated averaging")


@dataclass(frozen=True, kw_only=True)
class Federation:
    """One sequence of rounds: of an arm, perhaps with one site left out."""

    arm: str
    records: Sequence[RoundRecord]  # round 0 is the roll call
    left_out: str | None = None


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A checkpoint tried on a held-out target."""

    arm: str
    target: str
    round: int
    value: float  # of the lead metric; mean over splits and draws
    shots: int


@dataclass(frozen=True, kw_only=True)
class Example:
    """An image to show: uint8 (H, W) or (H, W, 3). Its mask, uint8 (H, W), is shown as a contour."""

    site: str
    label: str
    image: np.ndarray
    mask: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What an adapted network found in one query image; pictures of the same image stand beside each other."""

    target: str
    arm: str
    shots: int
    image: np.ndarray  # uint8 (H, W) or (H, W, 3)
    truth: np.ndarray | None  # uint8 (H, W), class index
    found: np.ndarray | None  # segmentation: uint8 (H, W), class index; anomaly: float32 (H, W) heat in [0, 1]
    caption: str  # of the network's answer


@dataclass(frozen=True, kw_only=True)
class StudyResults:
    """A finished study. Arms are 'random', 'local_only', 'fedavg', ..., 'meta', each perhaps + ' without privacy',
    and 'ceiling'."""

    plan: StudyPlan
    trials: Sequence[Trial]
    federations: Sequence[Federation]  # the study's own first
    curve: Sequence[CurvePoint] = ()
    sentences: Sequence[str] = ()  # the plan in words
    examples: Sequence[Example] = ()
    pictures: Sequence[Picture] = ()
    phantoms: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)  # wall time of each part
    remarks: Sequence[str] = ()  # further warnings
    at_hospitals: bool = False  # it ran with real hospitals: the lab has no image, so nothing is measured here

    @cached_property
    def rows(self) -> list[Row]:
        return summarise(self.trials, lead=self.lead)

    @property
    def private(self) -> bool:
        return self.plan.privacy is not None

    @property
    def kind(self) -> TaskKind:
        return self.plan.task.kind

    @property
    def metrics(self) -> dict[str, tuple[str, str]]:
        """name -> (title, meaning), of the plan's kind of task."""
        return metrics_of(self.kind)

    @property
    def lead(self) -> str:
        """The metric that headline, curves and ceilings speak of."""
        return lead_metric(self.kind)

    @property
    def lead_name(self) -> str:
        """The same in a sentence: 'balanced accuracy'."""
        return _LEADS[self.lead][1]

    @property
    def lead_shots(self) -> int:
        return self.plan.evaluation.lead_shots

    def shots_title(self, shots: int) -> str:
        """'5 per class' or '5 images'."""
        unit = shots_unit(self.kind, count=shots)
        return f"{shots} per class" if unit.endswith("per class") else f"{shots} {unit}"

    @property
    def lead_kind(self) -> Kind:
        """Held-out sites if any of them counts, else held-out patients."""
        counted = {row.kind for row in self.rows if row.target is None}
        return "held-out patients" if counted == {"held-out patients"} else "held-out site"

    @cached_property
    def _titles(self) -> dict[str, str]:
        own = algorithm_title(self.plan.algorithm, self.plan.outer)
        learns_to_learn = ALGORITHMS[self.plan.algorithm.name].learns_to_learn
        return (
            _TITLES
            | arm_titles(self.plan)
            | {META: f"Meta-initialization ({own})" if learns_to_learn else f"{own} (study)"}
        )

    def title(self, arm: str) -> str:
        """An arm's name for a reader."""
        base = arm.removesuffix(WITHOUT_PRIVACY)
        return self._titles.get(base, base) + arm[len(base) :]

    def short_title(self, arm: str) -> str:
        """The same for a narrow table."""
        base = arm.removesuffix(WITHOUT_PRIVACY)
        name = f"meta ({self.plan.algorithm.name})" if base == META else _SHORT_TITLES.get(base, base)
        return name if base == arm else f"{name}, no privacy"

    def find(self, kind: Kind, target: str | None, arm: str, shots: int) -> Row | None:
        """The summary's row of the lead metric, if it is there."""
        wanted = (kind, target, arm, shots, self.lead)
        return next((r for r in self.rows if (r.kind, r.target, r.arm, r.shots, r.metric) == wanted), None)


def versions() -> dict[str, str]:
    """Of this software, Python and the libraries that a figure depends on."""
    libraries = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {"consilium": software_version(), "python": platform.python_version(), **libraries}


def _learned_together(results: StudyResults) -> tuple[str, str]:
    rounds = [record for record in results.federations[0].records if record.round]
    kept = sum(record.status == "committed" for record in rounds)
    took_part = {site.site for record in rounds for site in record.sites if site.status == "ok"}
    done = f"{kept} of {results.plan.rounds} rounds were learned together by {len(took_part)} hospitals"
    return done, "What it is worth to a hospital is measured there, with its own images: they are not here."


def headline(results: StudyResults) -> tuple[str, str]:
    """What was gained: a few words, and a sentence with figures and intervals."""
    if results.at_hospitals:
        return _learned_together(results)
    row = results.find(results.lead_kind, None, META, results.lead_shots)
    if row is None:
        why = "On no target did even the ceiling beat guessing" if results.trials else "No target was evaluated"
        return "Nothing can be said about a gain", f"{why}, so the starts cannot be compared."
    gains = zip(_AGAINST, (row.over_random, row.over_averaging), strict=True)
    against = {name: gain for name, gain in gains if gain is not None}
    protection = "without privacy" if results.plan.privacy is None else f"at epsilon {results.plan.privacy.epsilon:g}"
    reached = (
        f"With {row.shots} labelled {shots_unit(results.kind, count=row.shots)}, the {_start(results)} reaches"
        f" {' '.join(_LEADS[results.lead])} of {show(row.value)} on {_where(row)}, {protection}"
    )
    parts = [_compared(results, row, name, gain) for name, gain in against.items()]
    return _short(against), f"{reached}. " + (f"That is {'; '.join(parts)}." if parts else "")


def _compared(results: StudyResults, mean: Row, name: str, gain: Estimate) -> str:
    """'+0.08 [+0.05, +0.11] against random initialization (a gain; ahead on 3 of 4)'."""
    alone = [results.find(mean.kind, target, META, mean.shots) for target in _counted(results, mean.kind)]
    gains = [row.over_random if name == _AGAINST[0] else row.over_averaging for row in alone if row]
    ahead = sum(gain is not None and gain.mean > 0 for gain in gains)
    return f"{show_gain(gain)} against {name} ({_verdict(gain)}; ahead on {ahead} of {len(gains)})"


def _counted(results: StudyResults, kind: Kind) -> list[str]:
    return list(dict.fromkeys(r.target for r in results.rows if r.target and r.kind == kind and r.learnable))


def warnings(results: StudyResults) -> list[str]:
    """What a reader must know before believing a figure."""
    found = [] if results.private else [UNPROTECTED]
    found += [PHANTOMS] if results.phantoms else []
    found += results.remarks
    for row in results.rows:
        if not row.learnable and row.arm == CEILING and row.metric == results.lead:
            why = f"its ceiling, {show(row.value)}, includes guessing"
            found.append(f"{row.target} ({row.kind}) is not counted in the mean: {why}")
    notes = Counter((t.target, t.shots, t.note) for t in results.trials if t.note)
    for (target, shots, note), count in notes.items():
        found.append(
            f"{target}, {results.shots_title(shots) if shots else 'ceiling'}: {note} ({count} trial{_s(count)})"
        )
    return found + _absences(results)


def _absences(results: StudyResults) -> list[str]:
    """Each site that missed a round, once per reason, over all federations."""
    records = [record for f in results.federations for record in f.records if record.round > 0]
    asked = Counter(site.site for record in records for site in record.sites)
    missed = Counter(
        (site.site, site.reason or site.code) for record in records for site in record.sites if site.status != "ok"
    )
    return [f"{site} missed {n} of {asked[site]} rounds: {reason}" for (site, reason), n in missed.items()]


def show_half(estimate: Estimate) -> str:
    """'0.71 ± 0.03', the half width of the interval."""
    return f"{estimate.mean:.2f} ± {estimate.high - estimate.mean:.2f}"


def federation_title(results: StudyResults, federation: Federation) -> str:
    """The arm's title, and the site left out."""
    title = results.title(federation.arm)
    return f"{title}, {federation.left_out} left out" if federation.left_out else title


def show(estimate: Estimate) -> str:
    """'0.71 [0.68, 0.74]'."""
    if math.isnan(estimate.mean):
        return "not measurable"
    if math.isnan(estimate.low):
        return f"{estimate.mean:.2f}"
    return f"{estimate.mean:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def show_gain(gain: Estimate) -> str:
    """'+0.08 [+0.05, +0.11]'."""
    if math.isnan(gain.low):
        return f"{gain.mean:+.2f}"
    return f"{gain.mean:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]"


def _where(row: Row) -> str:
    if row.kind == "held-out site":
        return f"{row.targets} held-out site{_s(row.targets)}"
    return f"held-out patients of {row.targets} hospital{_s(row.targets)}"


def _s(count: int) -> str:
    return "" if count == 1 else "s"


def _start(results: StudyResults) -> str:
    title = results.title(META)
    return title[:1].lower() + title[1:] if title.startswith("Meta") else title


def _verdict(gain: Estimate) -> str:
    if gain.low > 0:
        return "a gain"
    return "a loss" if gain.high < 0 else "no difference shown, the interval includes 0"


def _short(against: Mapping[str, Estimate]) -> str:
    ahead = [name for name, gain in against.items() if gain.low > 0]
    behind = [name for name, gain in against.items() if gain.high < 0]
    level = [name for name in against if name not in ahead and name not in behind]
    parts = [(ahead, "Ahead of"), (level, "not shown to differ from"), (behind, "behind")]
    words = ", ".join(f"{word} {' and '.join(names)}" for names, word in parts if names)
    return f"{words[:1].upper()}{words[1:]}" if words else "There is nothing to compare with"


def to_json(results: StudyResults) -> dict[str, Any]:
    """Plain data without nan; images are left out."""
    title, sentence = headline(results)
    document = {
        "study": results.plan.study,
        "plan_digest": results.plan.digest,
        "private": results.private,
        "lead_metric": results.lead,
        "phantoms": results.phantoms,
        "warnings": warnings(results),
        "headline": f"{title}. {sentence}",
        "arms": {arm: results.title(arm) for arm in dict.fromkeys(t.arm for t in results.trials)},
        "summary": [dataclasses.asdict(row) for row in results.rows],
        "curve": [dataclasses.asdict(point) for point in results.curve],
        "federations": [dataclasses.asdict(federation) for federation in results.federations],
        "trials": [dataclasses.asdict(trial) for trial in results.trials],
        "plan": results.plan.model_dump(mode="json"),
        "versions": dict(results.versions),
        "seconds": dict(results.seconds),
    }
    finite: dict[str, Any] = _finite(document)
    return finite


def _finite(value: Any) -> Any:
    """nan and infinity, which JSON does not know, as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
