"""From a site's folder to SiteData: every row fitted to the plan, or every problem at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from client.data.dataset import SiteData
from client.data.intake import Target, count_problems, fit_rows, plan_target, read_rows
from client.data.rows import Row, refuse
from client.site import SiteConfig, load_site_config
from common.errors import Problem
from common.findings import findings_in
from common.plan import StudyPlan, TaskKind


def load_site(folder: Path, plan: StudyPlan, *, site: str | None = None) -> SiteData:
    """The images of the site in `folder`, ready for the plan; `site` is its name in the plan, if not site.yaml's.

    Raises DataError with all problems of the folder (the first 20 and their number).
    """
    config = load_site_config(folder)
    name = site or config.name
    return _load(folder, config, name, plan_target(folder, plan, name))


def load_images(
    folder: Path, *, image_size: int, channels: int, labels: tuple[str, ...] | None = None, site: str | None = None
) -> SiteData:
    """The same for images of no plan: the lab's public ones.

    Raises DataError like `load_site`.
    """
    config = load_site_config(folder)
    return _load(folder, config, site or config.name, Target(image_size, channels, labels))


def _load(folder: Path, config: SiteConfig, name: str, target: Target) -> SiteData:
    problems: list[Problem] = []
    rows = list(fit_rows(read_rows(folder, config, problems, target), target, problems))
    training = {row.patient for row in rows if row.split == "train"}
    refuse(problems or count_problems(folder, len(rows), len(training), target))
    return _stack(name, rows, target)


def _stack(name: str, rows: list[Row], target: Target) -> SiteData:
    label_names = target.labels or tuple(sorted({row.label for row in rows}))
    patient_ids = tuple(sorted({row.patient for row in rows}))
    number = {patient: index for index, patient in enumerate(patient_ids)}
    masks = [row.mask for row in rows if row.mask is not None]
    return SiteData(
        site=name,
        images=torch.from_numpy(np.stack([row.pixels for row in rows])),
        labels=_labels(rows, label_names, target.kind),
        patients=torch.tensor([number[row.patient] for row in rows]),
        label_names=label_names,
        patient_ids=patient_ids,
        split=tuple(row.split for row in rows),
        masks=torch.from_numpy(np.stack(masks)) if len(masks) == len(rows) else None,
        kind=target.kind,
        details=tuple(row.details for row in rows),
        modalities=_modalities(rows, target.modalities),
    )


def _labels(rows: list[Row], names: tuple[str, ...], kind: TaskKind) -> Tensor:
    """As SiteData has them."""
    if kind == "segmentation":
        return torch.zeros(len(rows), dtype=torch.int64)
    if kind == "multilabel":
        return torch.tensor([[float(name in findings_in(row.label)) for name in names] for row in rows])
    return torch.tensor([names.index(row.label) for row in rows])


def _modalities(rows: list[Row], names: tuple[str, ...]) -> Tensor | None:
    return torch.tensor([names.index(row.details.modality) for row in rows]) if names else None
