"""From a site's folder to SiteData: every row fitted to the plan, or every problem at once."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from client.data.dataset import SiteData
from client.data.intake import Target, count_problems, fit_rows, plan_target, read_rows
from client.data.kept import ImageStore, KeptImages, NotKept, Pixels
from client.data.rows import NO_PIXELS, Row, refuse
from client.site import SiteConfig, load_site_config
from common.errors import Problem
from common.findings import findings_in
from common.plan import StudyPlan, TaskKind


def load_site(
    folder: Path,
    plan: StudyPlan,
    *,
    site: str | None = None,
    split: str | None = None,
    store: ImageStore | None = None,
) -> SiteData:
    """The images of the site in `folder`, ready for the plan; `site` is its name in the plan, if not site.yaml's.

    `split`: its rows alone, as `of_split` has them; every row is checked all the same. With `store` images that did not
    change are not read again, and those of a split are mapped, read-only, and take no memory.

    Raises DataError with all problems of the folder (the first 20 and their number).
    """
    config = load_site_config(folder)
    name = site or config.name
    return _load(folder, config, name, plan_target(folder, plan, name), split, store)


def load_images(
    folder: Path, *, image_size: int, channels: int, labels: tuple[str, ...] | None = None, site: str | None = None
) -> SiteData:
    """The same for images of no plan: the lab's public ones.

    Raises DataError like `load_site`.
    """
    config = load_site_config(folder)
    return _load(folder, config, site or config.name, Target(image_size, channels, labels), None, None)


def _load(
    folder: Path, config: SiteConfig, name: str, target: Target, split: str | None, store: ImageStore | None
) -> SiteData:
    terms = sorted(config.label_map.items())
    kept = store.open(target.view, size=target.image_size, channels=target.channels, terms=terms) if store else None
    if store is not None and kept is not None:
        try:
            with kept:
                rows = _rows(folder, config, target, kept)
                return _site_data(name, rows, _in_order(rows, kept.finish(), split), target, split)
        except NotKept as error:
            store.unusable(error)
    rows = _rows(folder, config, target)
    return _site_data(name, rows, _stacked(rows, split, target), target, split)


def _rows(folder: Path, config: SiteConfig, target: Target, kept: KeptImages | None = None) -> list[Row]:
    """Every row, its pixels left to `kept` where there is one. Raises DataError."""
    problems: list[Problem] = []
    rows: list[Row] = []
    for row in fit_rows(read_rows(folder, config, problems, target, kept), target, problems, kept):
        if kept is None:
            rows.append(row)
        else:
            kept.add(row)
            mask = None if row.mask is None else NO_PIXELS
            rows.append(Row(row.where, NO_PIXELS, row.label, row.patient, row.split, mask, row.details))
    training = {row.patient for row in rows if row.split == "train"}
    refuse(problems or count_problems(folder, len(rows), len(training), target))
    return rows


def _stacked(rows: list[Row], split: str | None, target: Target) -> Pixels:
    chosen = [row for row in rows if split in (None, row.split)]
    images = np.empty((len(chosen), target.channels, target.image_size, target.image_size), np.uint8)
    for index, row in enumerate(chosen):
        images[index] = row.pixels
    masks = [row.mask for row in chosen if row.mask is not None]
    return images, np.stack(masks) if masks and len(masks) == len(chosen) else None


def _in_order(rows: list[Row], kept: Mapping[str, Pixels], split: str | None) -> Pixels:
    """A split's as they are mapped; of several the rows stand among each other, and are copied."""
    there = [name for name, (images, _) in kept.items() if len(images)]
    if split is not None or len(there) == 1:
        return kept[split or there[0]]
    splits = np.array([row.split for row in rows])
    images, masks = zip(*(kept[name] for name in there), strict=True)
    places = [np.flatnonzero(splits == name) for name in there]
    return _merged(places, images), None if any(part is None for part in masks) else _merged(places, masks)


def _merged(places: list[np.ndarray], parts: Sequence[np.ndarray]) -> np.ndarray:
    whole = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), np.uint8)
    for place, part in zip(places, parts, strict=True):
        whole[place] = part
    return whole


def _site_data(name: str, rows: list[Row], pixels: Pixels, target: Target, split: str | None) -> SiteData:
    label_names = target.labels or tuple(sorted({row.label for row in rows}))
    patient_ids = tuple(sorted({row.patient for row in rows}))
    number = {patient: index for index, patient in enumerate(patient_ids)}
    images, masks = pixels
    every_mask = masks is not None and all(row.mask is not None for row in rows)
    chosen = [row for row in rows if split in (None, row.split)]
    return SiteData(
        site=name,
        images=_tensor(images),
        labels=_labels(chosen, label_names, target.kind),
        patients=torch.tensor([number[row.patient] for row in chosen], dtype=torch.int64),
        label_names=label_names,
        patient_ids=patient_ids,
        split=tuple(row.split for row in chosen),
        masks=_tensor(masks) if masks is not None and every_mask else None,
        kind=target.kind,
        details=tuple(row.details for row in chosen),
        modalities=_modalities(chosen, target.modalities),
    )


def _tensor(array: np.ndarray) -> Tensor:
    """Over the same memory."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nor does anybody write
        return torch.from_numpy(array)


def _labels(rows: list[Row], names: tuple[str, ...], kind: TaskKind) -> Tensor:
    """As SiteData has them."""
    if kind == "segmentation":
        return torch.zeros(len(rows), dtype=torch.int64)
    if kind == "multilabel":
        return torch.tensor([[float(name in findings_in(row.label)) for name in names] for row in rows])
    return torch.tensor([names.index(row.label) for row in rows])


def _modalities(rows: list[Row], names: tuple[str, ...]) -> Tensor | None:
    return torch.tensor([names.index(row.details.modality) for row in rows]) if names else None
