"""A folder's rows, fitted to what a plan asks of them; no torch, so that `data check` answers soon."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from client.data.kept import KeptImages
from client.data.manifest import manifest_rows
from client.data.npz import npz_rows
from client.data.readers import UnreadableImageError, fit_image, fit_mask
from client.data.rows import Row, one_split_each, refuse
from client.site import SITE_FILE, SiteConfig
from common.disclosure import shown
from common.errors import DataError, Problem
from common.findings import FINDINGS_BETWEEN, NO_FINDING, findings_in
from common.plan import RowFilter, StudyPlan, TaskKind
from common.yaml_lines import read_yaml


@dataclass(frozen=True)
class Target:
    """What a plan asks of a site's images."""

    image_size: int  # pixels, square
    channels: int
    labels: tuple[str, ...] | None  # in class-index order; None: whatever the folder has, sorted
    patients: int = 1  # at least so many in the training split
    kind: TaskKind = "classification"
    modalities: tuple[str, ...] = ()  # every row's is among them; empty: any
    where: RowFilter | None = None  # only these rows
    trains: bool = True

    @property
    def view(self) -> tuple[object, ...]:
        """What decides which images take part and what becomes of their pixels, whatever their labels are called."""
        masks = len(self.labels or ()) if self.kind == "segmentation" else 0
        healthy = self.labels[0] if self.kind == "anomaly" and self.trains and self.labels else None
        return self.image_size, self.channels, masks, healthy, self.where

    def wants(self, row: Row) -> bool:
        """Whether a row takes part: where anomalies are to be found, only healthy images train."""
        ill = self.labels is not None and row.label != self.labels[0]
        return not (self.kind == "anomaly" and self.trains and row.split == "train" and ill)


def read_rows(
    folder: Path,
    config: SiteConfig,
    problems: list[Problem],
    target: Target | None = None,
    kept: KeptImages | None = None,
) -> Iterator[Row]:
    """The folder's usable rows that `target` asks for, with the hospital's labels translated; rows that cannot be used
    add to `problems`. What is `kept` is not read again."""
    kind: TaskKind = target.kind if target else "classification"
    labelled = kind != "segmentation"
    if config.manifest is not None:
        rows = manifest_rows(folder, folder / config.manifest, problems, labelled=labelled, kept=kept)
    else:
        rows = npz_rows(folder / str(config.npz), problems, labelled=labelled, kept=kept)
    for row in one_split_each(rows, problems):
        if target is None or target.where is None or row.details.match(target.where):
            label = _translated(row.label, config.label_map, kind)
            yield row if label == row.label else dataclasses.replace(row, label=label)
        elif kept is not None:
            kept.pass_over(row)


def fit_rows(
    rows: Iterator[Row], target: Target, problems: list[Problem], kept: KeptImages | None = None
) -> Iterator[Row]:
    """The rows that fit and take part, `pixels` as uint8 (C, S, S) and `mask` as (S, S); those that do not fit add to
    `problems`."""
    for row in rows:
        found = [*_label_problems(row, target), *_modality_problems(row, target), *_mask_problems(row, target)]
        try:
            pixels = (
                row.pixels if row.fitted else fit_image(row.pixels, size=target.image_size, channels=target.channels)
            )
        except UnreadableImageError as error:
            found.append(Problem(row.where, str(error), "export larger images"))
        problems += found
        if found:
            continue
        if target.wants(row):
            yield row if row.fitted else dataclasses.replace(row, pixels=pixels, mask=_fitted_mask(row.mask, target))
        elif kept is not None:
            kept.pass_over(row)


def count_problems(folder: Path, rows: int, training_patients: int, target: Target | None) -> list[Problem]:
    """An empty site, or one with fewer training patients than the plan declares."""
    where = str(folder)
    if rows == 0:
        filtered = " and sites.<name>.where in the plan" if target and target.where else ""
        remedy = f"check the manifest or npz named in site.yaml{filtered}"
        return [Problem(where, "the site has no usable image", remedy)]
    if target and training_patients < target.patients:
        healthy = " with a healthy image" if target.kind == "anomaly" and target.trains else ""
        found = f"{shown(training_patients)} training patients{healthy}"
        what = f"{found}, but the plan declares {target.patients} for this site"
        return [Problem(where, what, "enrol more, or have the lab declare fewer (sites.<name>.patients)")]
    return []


def plan_target(folder: Path, plan: StudyPlan, name: str) -> Target:
    """What `plan` asks of the site `name`.

    Raises DataError if the plan has no such site, or label_map leads to labels that it does not know.
    """
    document = read_yaml(folder / SITE_FILE)
    if name not in plan.sites:
        remedy = f"the plan's sites: {', '.join(plan.sites)}"
        raise DataError(Problem(document.where(("name",)), f"the plan has no site {name!r}", remedy))
    site, labels = plan.sites[name], plan.labels_of(name)
    target = Target(
        plan.task.image_size,
        plan.task.channels,
        labels,
        site.patients,
        plan.task.kind,
        tuple(plan.task.modalities),
        site.where,
        site.role == "train",
    )
    mapping: Mapping[object, object] = document.data.get("label_map") or {}
    refuse(
        [
            Problem(
                document.where(("label_map", str(key))), f"{value!r} is no label of the plan", _advice(value, target)
            )
            for key, value in mapping.items()
            if target.kind != "segmentation" and value not in _words(target)
        ]
    )
    return target


def _translated(label: str, label_map: Mapping[str, str], kind: TaskKind) -> str:
    if kind != "multilabel":
        return label_map.get(label, label)
    parts = (part.strip() for part in label.split(FINDINGS_BETWEEN))
    return FINDINGS_BETWEEN.join(label_map.get(part, part) for part in parts)


def _label_problems(row: Row, target: Target) -> Iterator[Problem]:
    if target.labels is None or target.kind == "segmentation":
        return
    several = target.kind == "multilabel"
    unknown = [label for label in (findings_in(row.label) if several else [row.label]) if label not in target.labels]
    if unknown:
        what = "the plan does not know a finding of this row" if several else "the plan does not know this label"
        yield Problem(row.where, what, _advice(unknown[0], target))


def _modality_problems(row: Row, target: Target) -> Iterator[Problem]:
    if target.modalities and row.details.modality not in target.modalities:
        what = "the plan does not know this modality" if row.details.modality else "the modality is not known"
        yield Problem(row.where, what, f"in the column 'modality' write one of: {', '.join(target.modalities)}")


def _mask_problems(row: Row, target: Target) -> Iterator[Problem]:
    if target.kind != "segmentation" or target.labels is None:
        return
    if row.mask is None:
        remedy = "give a black mask if nothing is to be marked; `sites make --masked-only` leaves such rows out"
        yield Problem(row.where, "this row has no mask", remedy)
    elif not row.fitted and len(target.labels) > 2 and row.mask.max() >= len(target.labels):
        meaning = ", ".join(f"{value} {label}" for value, label in enumerate(target.labels))
        yield Problem(row.where, f"the mask holds a value that is not below {len(target.labels)}", f"write {meaning}")


def _fitted_mask(mask: np.ndarray | None, target: Target) -> np.ndarray | None:
    if mask is None:
        return None
    binary = target.kind == "segmentation" and len(target.labels or ()) == 2
    return fit_mask((mask > 0).astype(np.uint8) if binary else mask, size=target.image_size)


def _words(target: Target) -> tuple[str, ...]:
    """What a label, or a finding, may be."""
    return (target.labels or ()) + ((NO_FINDING,) if target.kind == "multilabel" else ())


def _advice(label: object, target: Target) -> str:
    words = _words(target)
    nearest = difflib.get_close_matches(str(label), words, n=1, cutoff=0.6)
    guess = f"did you mean {nearest[0]!r}? " if nearest else ""
    alone = f" (alone; '{FINDINGS_BETWEEN}' stands between findings)" if target.kind == "multilabel" else ""
    allowed = f"{guess}allowed: {', '.join(words)}{alone}"
    return f"{allowed}; translate the hospital's own labels with label_map in site.yaml"
