"""What adapted parameters answer about images, and what the answers are worth, for each kind of task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from client.data.dataset import SiteData
from common.episodes import Batch
from common.images import standardise
from common.learner import Learner
from common.metrics import (
    anomaly_metrics,
    chance_of,
    classification_metrics,
    multilabel_metrics,
    segmentation_metrics,
)
from common.params import Params
from common.plan import StudyPlan

_CHUNK = 100  # images in one forward pass

DIVERGED = "the adaptation diverged and counts as guessing"


@dataclass(frozen=True)
class Verdict:
    """Metrics of one adaptation, what guessing gives in the lead one, and a note if it was not as planned."""

    metrics: dict[str, float]
    chance: float
    note: str


def judge(learner: Learner, phi: Params, support: Batch, data: SiteData, inputs: Tensor, plan: StudyPlan) -> Verdict:
    """The answers of `phi` about the rows of `data`, whose inputs are `inputs`, against what is right."""
    answers = answers_of(learner, phi, support, inputs, plan)
    finite = torch.isfinite(answers)
    note = "" if finite.all() else DIVERGED
    if note:
        answers = torch.zeros_like(answers)
    targets = data.targets
    if plan.evaluation.fuse == "patient":
        answers, targets = _fused(answers, targets, data)
    chance = chance_of(data.kind, targets, data.ways)
    return Verdict(_METRICS[data.kind](answers, targets, data.ways), chance, note)


@torch.no_grad()
def answers_of(learner: Learner, phi: Params, support: Batch, inputs: Tensor, plan: StudyPlan) -> Tensor:
    """Logits (n, ways) or (n, ways, H, W); for anomalies how unusual each image is, (n,).

    Unusual: far from the mean of the healthy support's features (prototypes), or badly drawn by an autoencoder that
    learned to draw healthy images.
    """
    if plan.task.kind != "anomaly":
        return _in_chunks(lambda chunk: learner.outputs(phi, chunk), inputs)
    if plan.model.name == "autoencoder":
        return error_maps(learner, phi, inputs).mean(dim=(1, 2))
    healthy = _in_chunks(lambda chunk: learner.features(phi, chunk), support.inputs).mean(dim=0)
    away: Tensor = (_in_chunks(lambda chunk: learner.features(phi, chunk), inputs) - healthy).norm(dim=1)
    return away


@torch.no_grad()
def error_maps(learner: Learner, phi: Params, inputs: Tensor) -> Tensor:
    """(n, H, W): how far each pixel is from what the autoencoder draws."""

    def of_chunk(chunk: Tensor) -> Tensor:
        error: Tensor = (learner.outputs(phi, chunk) - standardise(chunk)).square().mean(dim=1)
        return error

    return _in_chunks(of_chunk, inputs)


def _in_chunks(function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    return torch.cat([function(chunk) for chunk in inputs.split(_CHUNK)])


def _fused(answers: Tensor, targets: Tensor, data: SiteData) -> tuple[Tensor, Tensor]:
    """One answer for each patient and truth: the mean over the patient's modalities of the mean over their images."""
    modalities = torch.zeros(len(data), dtype=torch.int64) if data.modalities is None else data.modalities
    cases, case_of = torch.unique(torch.stack([data.patients, data.strata], dim=1), dim=0, return_inverse=True)
    fused, true = [], []
    for case in range(len(cases)):
        rows = torch.nonzero(case_of == case).flatten()
        means = [answers[rows[modalities[rows] == m]].mean(dim=0) for m in modalities[rows].unique()]
        fused.append(torch.stack(means).mean(dim=0))
        true.append(targets[rows[0]])
    return torch.stack(fused), torch.stack(true)


_METRICS: dict[str, Callable[[Tensor, Tensor, int], dict[str, float]]] = {
    "classification": lambda logits, labels, ways: classification_metrics(logits.softmax(dim=1), labels),
    "multilabel": lambda logits, findings, ways: multilabel_metrics(logits.sigmoid(), findings),
    "segmentation": lambda logits, masks, ways: segmentation_metrics(logits.argmax(dim=1), masks, ways),
    "anomaly": lambda scores, labels, ways: anomaly_metrics(scores, labels > 0),
}
