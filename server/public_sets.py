"""The lab's public data sets, and what a plan has a network learn from each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from common.augment import augment, augment_with_masks
from common.errors import DataError, Problem
from common.findings import FINDINGS_BETWEEN, findings_in
from common.images import normalise, with_modality
from common.plan import StudyPlan
from common.tasks import RECONSTRUCTION, TASKS, Task

_SMOOTHING = 0.05  # of the labels


@dataclass(frozen=True)
class PublicSet:
    """One public data set, fitted to a plan's size and channels. Rows agree across all fields."""

    name: str
    images: Tensor  # uint8 (n, C, H, W)
    labels: Tensor  # int64 (n,), index into label_names
    label_names: tuple[str, ...]
    patients: Tensor  # int64 (n,)
    masks: Tensor | None = None  # (n, H, W), 0 = background; None unless every row has one
    modalities: Tensor | None = None  # int64 (n,), index into the plan's, -1 for another; None if the plan names none
    free: bool = False  # no image has an up or a left, as under a microscope

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, index: Tensor) -> PublicSet:
        """The rows at `index` (int64)."""
        return replace(
            self,
            images=self.images[index],
            labels=self.labels[index],
            patients=self.patients[index],
            masks=None if self.masks is None else self.masks[index],
            modalities=None if self.modalities is None else self.modalities[index],
        )

    def inputs(self) -> Tensor:
        """Every image as a network takes it."""
        return self._as_inputs(self.images, torch.arange(len(self)))

    def views(self, rows: Tensor, rng: torch.Generator) -> Tensor:
        """One random view of each of these rows, as a network takes it."""
        return self._as_inputs(augment(self._shown(rows), rng, free=self._lies(rows)) * 255.0, rows)

    def views_with_masks(self, rows: Tensor, masks: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """The same, with the rows' masks int64 (m, H, W), which move along."""
        views, moved = augment_with_masks(self._shown(rows), masks, rng, free=self._lies(rows))
        return self._as_inputs(views * 255.0, rows), moved

    def _shown(self, rows: Tensor) -> Tensor:
        return self.images[rows].float() / 255.0

    def _lies(self, rows: Tensor) -> Tensor | None:
        return torch.ones(len(rows), dtype=torch.bool) if self.free else None

    def _as_inputs(self, images: Tensor, rows: Tensor) -> Tensor:
        inputs = normalise(images)
        return inputs if self.modalities is None else with_modality(inputs, self.modalities[rows])


@dataclass(frozen=True)
class Lesson:
    """What is learned from one public set."""

    public: PublicSet
    task: Task
    targets: Tensor  # (n, ...), as the task's loss takes them
    ways: int

    def draw(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and targets of random views of `count` random images."""
        rows = torch.randint(len(self.public), (count,), generator=rng)
        if self.targets.dim() == 3:
            return self.public.views_with_masks(rows, self.targets[rows], rng)
        return self.task.views(self.public.views(rows, rng), self.targets[rows], rng)


def lessons_of(sets: Sequence[PublicSet], plan: StudyPlan) -> list[Lesson]:
    """One lesson for each set; a plan that segments learns from those that have masks.

    Raises DataError if nothing can be learned, or an image has none of the plan's modalities.
    """
    usable = [public for public in sets if len(public)]
    if strangers := [public.name for public in usable if _of_no_modality(public)]:
        what = f"public images of a modality that the plan does not name: {', '.join(strangers)}"
        allowed = ", ".join(plan.task.modalities)
        raise DataError(Problem("public sets", what, f"give their column 'modality' one of: {allowed}; or leave out"))
    if plan.task.kind == "segmentation":
        usable = [public for public in usable if public.masks is not None and bool(public.masks.any())]
    if not usable:
        missing = "images with masks" if plan.task.kind == "segmentation" else "images"
        remedy = "check the path and --avoid" + ("; `sites make --masked-only`" if missing != "images" else "")
        raise DataError(Problem("public sets", f"there are no public {missing}", remedy))
    return [_lesson_of(public, plan) for public in usable]


def _of_no_modality(public: PublicSet) -> bool:
    return public.modalities is not None and bool((public.modalities < 0).any())


def _lesson_of(public: PublicSet, plan: StudyPlan) -> Lesson:
    if plan.model.name == "autoencoder":
        return Lesson(public, RECONSTRUCTION, public.labels, 1)
    if plan.task.kind == "segmentation" and public.masks is not None:
        values, targets = public.masks.unique(return_inverse=True)
        return Lesson(public, TASKS["segmentation"], targets, len(values))
    if plan.task.kind == "multilabel" and any(FINDINGS_BETWEEN in name for name in public.label_names):
        findings = sorted(set().union(*map(findings_in, public.label_names)))
        of_name = torch.tensor([[float(one in findings_in(name)) for one in findings] for name in public.label_names])
        return Lesson(public, TASKS["multilabel"], of_name[public.labels], len(findings))
    return Lesson(public, _SMOOTHED, public.labels, len(public.label_names))


def _smoothed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, reduction="none", label_smoothing=_SMOOTHING)


_SMOOTHED = replace(TASKS["classification"], loss=_smoothed_cross_entropy)
