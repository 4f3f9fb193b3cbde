"""Trials of few-shot adaptation, and what may be said of many of them: a mean and its 95 % interval."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

RANDOM = "random"  # arm: a random initialization
CEILING = "ceiling"  # arm: training on every support patient

Kind = Literal["held-out site", "held-out patients"]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One adaptation: a start, a support set, and metrics on the query pool of other patients."""

    target: str  # the site
    kind: Kind
    ways: int
    chance: float  # the lead metric by guessing (`common.metrics.chance_of`)
    arm: str  # where the adaptation started
    shots: int  # labelled images, counted in `shots_unit`; 0 for the ceiling
    split: int
    draw: int
    metrics: Mapping[str, float]  # `common.metrics.metrics_of` the task; nan where the query pool cannot tell
    note: str = ""  # what was not as planned: a class with too few images


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval, which is nan where one value alone says nothing of spread."""

    mean: float
    low: float
    high: float


def shots_unit(kind: str, *, count: int = 2) -> str:
    """What shots count in a kind of task: 'images per class', or 'image per class' for a count of 1."""
    unit, rest = {"segmentation": ("image", ""), "anomaly": ("healthy image", "")}.get(kind, ("image", " per class"))
    return f"{unit}{'' if count == 1 else 's'}{rest}"


def split_means(values: Iterable[tuple[int, float]]) -> dict[int, float]:
    """The mean of (split, value) pairs in each split; values that are nan are left out.

    The split is the unit of every interval here: draws of one split share its query patients, so they vary
    together, and an interval over all draws would be too narrow. It speaks of this site's patients, not of
    sites in general.
    """
    by_split: dict[int, list[float]] = defaultdict(list)
    for split, value in values:
        if not math.isnan(value):
            by_split[split].append(value)
    return {split: mean(group) for split, group in by_split.items()}


def interval(values: Sequence[float], *, overlap: float = 0.0) -> Estimate:
    """Mean and 95 % interval (Student t) of independent values.

    Values of a cross-validation are not: their training sets overlap. `overlap`, test patients over training patients,
    widens the interval for that (Nadeau, Bengio 2003, section 3; Bouckaert, Frank 2004 for repeats): the variance of
    the mean is s^2 (1/n + overlap).
    """
    centre = mean(values)
    if len(values) < 2:
        return Estimate(centre, math.nan, math.nan)
    from scipy.special import stdtrit  # here: its import takes a third of a second

    variance = math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1)
    half = float(stdtrit(len(values) - 1, 0.975)) * math.sqrt(variance * (1 / len(values) + overlap))
    return Estimate(centre, centre - half, centre + half)


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; nan of nothing."""
    return math.fsum(values) / len(values) if values else math.nan
