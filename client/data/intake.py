"""A folder's rows, fitted to what a plan asks of them; no torch, so that `data check` answers soon."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from client.data.manifest import manifest_rows
from client.data.npz import npz_rows
from client.data.readers import UnreadableImageError, fit_image, fit_mask
from client.data.rows import Row, one_split_each, refuse
from client.site import SITE_FILE, SiteConfig
from common.errors import DataError, Problem
from common.plan import StudyPlan
from common.yaml_lines import read_yaml


@dataclass(frozen=True)
class Target:
    """What a plan asks of a site's images."""

    image_size: int  # pixels, square
    channels: int
    labels: tuple[str, ...] | None  # in class-index order; None: whatever the folder has, sorted
    patients: int = 1  # at least so many in the training split


def read_rows(folder: Path, config: SiteConfig, problems: list[Problem]) -> Iterator[Row]:
    """The folder's usable rows, with the hospital's labels translated; the others add to `problems`."""
    if config.manifest is not None:
        rows = manifest_rows(folder, folder / config.manifest, problems)
    else:
        rows = npz_rows(folder / str(config.npz), problems)
    for row in one_split_each(rows, problems):
        yield dataclasses.replace(row, label=config.label_map.get(row.label, row.label))


def fit_rows(rows: Iterator[Row], target: Target, problems: list[Problem]) -> Iterator[Row]:
    """The rows that fit, `pixels` as uint8 (C, S, S) and `mask` as (S, S); the others add to `problems`."""
    for row in rows:
        if target.labels is not None and row.label not in target.labels:
            problems.append(Problem(row.where, "the plan does not know this label", _advice(row.label, target.labels)))
            continue
        try:
            pixels = fit_image(row.pixels, size=target.image_size, channels=target.channels)
        except UnreadableImageError as error:
            problems.append(Problem(row.where, str(error), "export larger images"))
            continue
        mask = None if row.mask is None else fit_mask(row.mask, size=target.image_size)
        yield dataclasses.replace(row, pixels=pixels, mask=mask)


def count_problems(folder: Path, rows: int, training_patients: int, target: Target | None) -> list[Problem]:
    """An empty site, or one with fewer training patients than the plan declares."""
    where = str(folder)
    if rows == 0:
        return [Problem(where, "the site has no usable image", "check the manifest or npz named in site.yaml")]
    if target and training_patients < target.patients:
        what = f"{training_patients} training patients, but the plan declares {target.patients} for this site"
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
    labels = plan.labels_of(name)
    mapping: Mapping[object, object] = document.data.get("label_map") or {}
    refuse(
        [
            Problem(
                document.where(("label_map", str(key))), f"{value!r} is no label of the plan", _advice(value, labels)
            )
            for key, value in mapping.items()
            if value not in labels
        ]
    )
    return Target(plan.task.image_size, plan.task.channels, labels, plan.sites[name].patients)


def _advice(label: object, allowed: tuple[str, ...]) -> str:
    nearest = difflib.get_close_matches(str(label), allowed, n=1, cutoff=0.6)
    guess = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"{guess}allowed: {', '.join(allowed)}; translate the hospital's own labels with label_map in site.yaml"
