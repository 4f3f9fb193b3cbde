"""How well held-out patients were answered, all of them and by age, sex and scanner, each with its interval."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from client.data.dataset import SiteData
from client.data.rows import Details
from common.disclosure import LEAST_COUNT
from common.metrics import anomaly_metrics, segmentation_metrics
from common.trials import Estimate

EVERYONE = "everyone"
_RESAMPLES = 1000
_SLOW_RESAMPLES = 200  # of a metric that is no mean of shares
_AGES = ((0, 40, "under 40"), (40, 65, "40 to 64"), (65, math.inf, "65 and older"))  # years


@dataclass(frozen=True)
class Group:
    """The lead metric among some held-out patients. `value` is nan where they cannot tell it."""

    detail: str  # "age", "sex", "scanner", or EVERYONE
    name: str
    patients: int
    images: int
    value: Estimate


def groups_of(data: SiteData, answers: Tensor, *, seed: int) -> list[Group]:
    """Everyone, then each group of at least LEAST_COUNT patients; `answers` are about the rows of `data`."""
    found = []
    for detail, name, member in _members(data):
        rows = torch.nonzero(member).flatten()
        patients = len(data.patients[rows].unique())
        if patients >= LEAST_COUNT or detail == EVERYONE:
            value = lead_estimate(data.rows(rows), answers[rows], seed=seed)
            found.append(Group(detail, name, patients, len(rows), value))
    return found


def lead_estimate(data: SiteData, answers: Tensor, *, seed: int) -> Estimate:
    """The kind's lead metric, and the interval of its bootstrap over patients (percentiles 2.5 and 97.5).

    An interval without width says only that no patient here was answered otherwise.
    """
    rng = torch.Generator().manual_seed(seed)
    if data.kind == "anomaly":
        return _auroc(answers, data.labels > 0, data.patients, rng)
    hits, chances = _shares(data, answers)
    of_patient = torch.unique(data.patients, return_inverse=True)[1]
    count = int(of_patient.max()) + 1
    hits = torch.zeros(count, hits.shape[1], dtype=torch.float64).index_add(0, of_patient, hits)
    chances = torch.zeros(count, chances.shape[1], dtype=torch.float64).index_add(0, of_patient, chances)
    drawn = torch.randint(count, (_RESAMPLES, count), generator=rng)
    weights = torch.zeros(_RESAMPLES, count, dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    resampled = ((weights @ hits) / (weights @ chances)).mean(dim=1)
    return _percentiles(float((hits.sum(0) / chances.sum(0)).mean()), resampled)


def rightness(data: SiteData, answers: Tensor) -> Tensor:
    """(n,) in [0, 1]: whether, or how well, each image was answered: right label, share of findings, Dice."""
    if data.kind == "classification":
        return (answers.argmax(dim=1) == data.labels).double()
    if data.kind == "multilabel":
        return ((answers > 0) == (data.labels > 0.5)).double().mean(dim=1)
    found, true = answers.argmax(dim=1), data.targets
    pairs = zip(found.split(1), true.split(1), strict=True)
    return torch.tensor([segmentation_metrics(*pair, data.ways)["dice"] for pair in pairs], dtype=torch.float64)


def _shares(data: SiteData, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Hits and chances (n, m), float64: the lead metric is the mean over columns of sum(hits) / sum(chances).

    Columns that nobody has are left out, as `common.metrics` does.
    """
    if data.kind == "segmentation":
        right = rightness(data, answers).unsqueeze(1)
        return right, torch.ones_like(right)
    if data.kind == "multilabel":
        shown, told = data.labels > 0.5, answers > 0
        both = shown.any(0) & ~shown.all(0)
        chances = torch.cat([shown[:, both], ~shown[:, both]], dim=1)
        hits = torch.cat([(shown & told)[:, both], (~shown & ~told)[:, both]], dim=1)
    else:
        chances = data.labels.unsqueeze(1) == data.labels.unique()
        hits = chances & (answers.argmax(dim=1) == data.labels).unsqueeze(1)
    return hits.double(), chances.double()


def _auroc(scores: Tensor, ill: Tensor, patients: Tensor, rng: torch.Generator) -> Estimate:
    rows_of = [torch.nonzero(patients == patient).flatten() for patient in patients.unique()]
    values = []
    for _ in range(_SLOW_RESAMPLES):
        drawn = torch.randint(len(rows_of), (len(rows_of),), generator=rng).tolist()
        rows = torch.cat([rows_of[i] for i in drawn])
        values.append(anomaly_metrics(scores[rows], ill[rows])["auroc"])
    return _percentiles(anomaly_metrics(scores, ill)["auroc"], torch.tensor(values, dtype=torch.float64))


def _percentiles(value: float, resampled: Tensor) -> Estimate:
    known = resampled[~resampled.isnan()]
    if math.isnan(value) or len(known) < len(resampled) / 2:
        return Estimate(value, math.nan, math.nan)
    low, high = known.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(value, low, high)


def _members(data: SiteData) -> Iterator[tuple[str, str, Tensor]]:
    """(detail, name, bool (n,))."""
    yield EVERYONE, EVERYONE, torch.ones(len(data), dtype=torch.bool)
    known = data.details or (Details(),) * len(data)
    for low, high, name in _AGES:
        yield "age", name, torch.tensor([low <= detail.age < high for detail in known])
    for detail in ("sex", "scanner"):
        column = [getattr(row, detail) for row in known]
        for name in sorted(set(column) - {""}):
            yield detail, name, torch.tensor([value == name for value in column])
