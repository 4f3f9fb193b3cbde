"""What each kind of task optimises and counts, per image, so that it can be averaged inside a patient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from common.cut_paste import cut_paste
from common.images import split_modality, standardise, with_modality
from common.plan import StudyPlan

PerImage = Callable[[Tensor, Tensor], Tensor]  # (outputs, targets), one row per image -> float (n,)
Views = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]

_SMOOTH = 1.0  # pixels; keeps the Dice loss of an empty class finite and its gradient small


@dataclass(frozen=True)
class Task:
    """`views` maps normalised inputs (n, C, H, W) and targets to v * n rows, view by view: what is learned from n
    images. Most tasks learn from the images as they are (v = 1).
    """

    loss: PerImage
    score: PerImage  # in [0, 1], higher is better
    views: Views = lambda inputs, targets, rng: (inputs, targets)


def task_of(plan: StudyPlan, site: str) -> Task:
    """The plan's task at `site`, its rare labels weighed up where the plan declares how rare they are."""
    if plan.task.kind == "classification" and (shares := plan.sites[site].prevalence):
        return Task(loss=_weighted_cross_entropy(torch.tensor(shares)), score=_correct)
    if plan.task.kind == "anomaly" and plan.model.name == "autoencoder":
        return RECONSTRUCTION
    if plan.task.kind == "anomaly":
        return CUT_PASTE_OF_A_MODALITY if plan.task.modalities else CUT_PASTE
    return TASKS[plan.task.kind]


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(n, ways), int64 (n,)."""
    return functional.cross_entropy(logits, labels, reduction="none")


def _weighted_cross_entropy(shares: Tensor) -> PerImage:
    """Each label weighs 1 / (ways * its share), so that all labels together weigh the same."""
    weights = 1.0 / (len(shares) * shares)
    return lambda logits, labels: _cross_entropy(logits, labels) * weights.to(logits)[labels]


def _correct(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(dim=1) == labels).float()


def _binary_cross_entropy(logits: Tensor, findings: Tensor) -> Tensor:
    """(n, findings), float (n, findings) of 0 and 1; the mean over findings."""
    return functional.binary_cross_entropy_with_logits(logits, findings, reduction="none").mean(dim=1)


def _findings_correct(logits: Tensor, findings: Tensor) -> Tensor:
    return ((logits > 0) == (findings > 0.5)).float().mean(dim=1)


def _dice_cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    """(n, ways, H, W), int64 (n, H, W): mean cross-entropy of the pixels + 1 - soft Dice of the foreground classes
    (Milletari 2016, arXiv:1606.04797)."""
    pixels = functional.cross_entropy(logits, masks, reduction="none").mean(dim=(1, 2))
    found = logits.softmax(dim=1)[:, 1:]
    foreground = torch.arange(1, logits.shape[1], device=masks.device).reshape(-1, 1, 1)
    true = (masks.unsqueeze(1) == foreground).to(found)  # one_hot does not go under vmap
    both = (found * true).sum(dim=(2, 3))
    dice = (2 * both + _SMOOTH) / (found.square().sum(dim=(2, 3)) + true.sum(dim=(2, 3)) + _SMOOTH)
    return pixels + 1 - dice.mean(dim=1)


def _dice_score(logits: Tensor, masks: Tensor) -> Tensor:
    """Dice of all foreground pixels against background; 1 where there is none and none was found."""
    found, true = logits.argmax(dim=1) > 0, masks > 0
    size = found.sum(dim=(1, 2)) + true.sum(dim=(1, 2))
    both = ((logits.argmax(dim=1) == masks) & true).sum(dim=(1, 2))
    return torch.where(size > 0, 2 * both / size.clamp(min=1), torch.ones_like(size)).float()


def _squared_error(drawn: Tensor, images: Tensor) -> Tensor:
    """(n, C, H, W) twice: what an autoencoder drew against what it was shown, each image standardised."""
    return (drawn - standardise(images)).square().mean(dim=(1, 2, 3))


def _pasted(inputs: Tensor, targets: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    clean = torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device)
    return torch.cat([inputs, cut_paste(inputs, rng)]), torch.cat([clean, clean + 1])


def _pasted_of_a_modality(inputs: Tensor, targets: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    images, modalities = split_modality(inputs)
    views, labels = _pasted(images, targets, rng)
    return with_modality(views, modalities.repeat(2)), labels


CUT_PASTE = Task(_cross_entropy, _correct, _pasted)
CUT_PASTE_OF_A_MODALITY = Task(_cross_entropy, _correct, _pasted_of_a_modality)
RECONSTRUCTION = Task(
    loss=_squared_error,
    score=lambda drawn, images: torch.exp(-_squared_error(drawn, images)),
    views=lambda inputs, targets, rng: (inputs, inputs),
)
TASKS = {
    "classification": Task(_cross_entropy, _correct),
    "multilabel": Task(_binary_cross_entropy, _findings_correct),
    "segmentation": Task(_dice_cross_entropy, _dice_score),
}
