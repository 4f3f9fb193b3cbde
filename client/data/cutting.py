"""Cutting data sets (`.npz`) into hospitals, by patient: no patient is in two hospitals, two splits, or both public
and in a hospital. A file's own official split is not used. Everything is decided by the seed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from client.data.npz import NpzTable, read_npz
from client.data.readers import UnreadableImageError, to_uint8
from client.data.rows import refuse
from client.data.site_folder import Format, SiteImages, write_sites
from client.site import Orientation
from common.errors import DataError, Problem

By = Literal["site", "dataset", "dirichlet"]

PUBLIC = "public"  # folder below OUT for the lab's warm-start data


def make_sites(
    out: Path,
    sources: Sequence[Path],
    *,
    by: By,
    names: Sequence[str] = (),
    only: str | None = None,
    sites: int = 4,
    alpha: float = 1.0,
    test_fraction: float = 0.25,
    public_fraction: float = 0.0,
    limit_per_class: int | None = None,
    seed: int = 0,
    format: Format = "npz",
    masked_only: bool = False,
    orientation: Orientation = "fixed",
    say: Callable[[str], None] = lambda text: None,
) -> list[Path]:
    """Cut `sources` into site folders below `out`; returns the folders.

    `by`: 'site' (the file's site column), 'dataset' (one hospital per file), 'dirichlet' (`sites` hospitals per file
    whose label shares come from Dirichlet(`alpha`): the smaller, the more skewed).
    `names`: the hospitals' names in the order in which they would be made. `only`: the one value of the site column to
    keep. `test_fraction` of each hospital's patients get split 'test'; `public_fraction` go to `out`/public/<name>;
    both are drawn within each label. `limit_per_class`: at most so many images of a label in each hospital.
    `masked_only`: leave out rows without a mask; `say` hears how many. `orientation`: for site.yaml.
    Raises DataError with every problem; then nothing is written.
    """
    _check_numbers(sites=sites, alpha=alpha, test=test_fraction, public=public_fraction, limit=limit_per_class)
    kept = [_kept(source, by, only, say, masked_only=masked_only) for source in sources]
    hospitals = [piece for whole, values in kept for piece in _pieces(whole, values, by, sites, alpha, seed)]
    hospitals = [dataclasses.replace(hospital, orientation=orientation) for hospital in hospitals]
    _no_patient_twice(hospitals)
    hospitals = _named(hospitals, names)
    folders: list[tuple[str, SiteImages]] = []
    for hospital in hospitals:
        rng = np.random.default_rng([seed, *hospital.name.encode()])
        limited = hospital if limit_per_class is None else _limited(hospital, limit_per_class, rng)
        public = _drawn(limited, public_fraction, rng)
        if public.any():
            folders.append((f"{PUBLIC}/{hospital.name}", limited.rows(public)))
        own = limited.rows(~public)
        if len(own.labels):
            folders.append((hospital.name, split_patients(own, test_fraction, rng)))
    return write_sites(out, folders, format=format)


def split_patients(site: SiteImages, test_fraction: float, rng: np.random.Generator) -> SiteImages:
    """The same images, with `test_fraction` of the patients of each label in split 'test'."""
    return dataclasses.replace(site, split=np.where(_drawn(site, test_fraction, rng), "test", "train"))


def _check_numbers(*, sites: int, alpha: float, test: float, public: float, limit: int | None) -> None:
    wrong = []
    if sites < 1:
        wrong.append(f"sites is {sites}: give at least 1")
    if not alpha > 0:
        wrong.append(f"alpha is {alpha}: give a number above 0")
    if not 0 <= test < 1:
        wrong.append(f"test fraction is {test}: give at least 0 and below 1")
    if not 0 <= public <= 1:
        wrong.append(f"public fraction is {public}: give 0 to 1")
    if limit is not None and limit < 1:
        wrong.append(f"limit per class is {limit}: give at least 1")
    refuse([Problem("", text) for text in wrong])


def _kept(
    source: Path, by: By, only: str | None, say: Callable[[str], None], *, masked_only: bool
) -> tuple[SiteImages, np.ndarray | None]:
    """The rows of one file that are asked for, split 'train' everywhere, and the site column where there is one."""
    table = _table(source)
    values = np.array(table.sites) if table.sites is not None else None
    if values is None and (by == "site" or only is not None):
        raise DataError(Problem(str(source), "has no 'site' column", "cut by data set or by Dirichlet split"))
    keep = np.ones(len(table), dtype=bool)
    if only is not None and values is not None:
        if only not in values:
            raise DataError(
                Problem(str(source), f"no row has site {only!r}", f"it has: {', '.join(np.unique(values))}")
            )
        keep = values == only
    if masked_only:
        if not (keep & table.has_mask).any():
            raise DataError(Problem(str(source), "no row has a mask", "give masks, or leave out --masked-only"))
        say(f"{source}: {(keep & ~table.has_mask).sum()} of {keep.sum()} images have no mask and are left out")
        keep &= table.has_mask
    return _site_images(table).rows(keep), None if values is None else values[keep]


def _pieces(
    whole: SiteImages, values: np.ndarray | None, by: By, sites: int, alpha: float, seed: int
) -> list[SiteImages]:
    """The hospitals of one file, with the names that it suggests."""
    if by == "site" and values is not None:
        return [dataclasses.replace(whole.rows(values == v), name=_slug(v)) for v in np.unique(values)]
    if by == "dirichlet":
        return _dirichlet(whole, sites, alpha, np.random.default_rng([seed, *whole.name.encode()]))
    return [whole]


def _table(source: Path) -> NpzTable:
    problems: list[Problem] = []
    table = read_npz(source, problems)
    refuse(problems)
    if table is None or len(table) == 0:
        raise DataError(Problem(str(source), "holds no image"))
    return table


def _site_images(table: NpzTable) -> SiteImages:
    problems: list[Problem] = []
    images = []
    for row, pixels in enumerate(table.images):
        try:
            images.append(to_uint8(pixels))
        except UnreadableImageError as error:
            problems.append(Problem(table.where(row), f"image: {error}"))
        if not table.patients[row]:
            problems.append(Problem(table.where(row), "the patient's id is empty"))
    unknown = [row for row, label in enumerate(table.labels) if label not in table.label_names]
    problems += [Problem(table.where(row), "the label is not in label_names") for row in unknown]
    refuse(problems)
    number = {label: index for index, label in enumerate(table.label_names)}
    labels = np.array([number[label] for label in table.labels], dtype=np.int64)
    return SiteImages(
        _slug(table.path.stem),
        np.stack(images),
        labels,
        np.array(table.patients),
        np.full(len(table), "train"),
        table.label_names,
        table.details,
        table.masks,
        table.has_mask,
    )


def _majority(site: SiteImages) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(patients (p,), each one's most frequent label (p,), each row's index into patients (n,))."""
    patients, index = np.unique(site.patients, return_inverse=True)
    counts = np.zeros((len(patients), len(site.label_names)), dtype=np.int64)
    np.add.at(counts, (index, site.labels), 1)
    return patients, counts.argmax(axis=1), index


def _drawn(site: SiteImages, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """bool (n,): rows of `fraction` of the patients of each majority label; at least one of two or more, never all
    unless the fraction is 1."""
    patients, majority, index = _majority(site)
    chosen = np.zeros(len(patients), dtype=bool)
    for label in np.unique(majority):
        members = rng.permutation(np.flatnonzero(majority == label))
        count = round(fraction * len(members))
        if 0 < fraction < 1:
            count = min(max(count, 1), len(members) - 1)
        chosen[members[:count]] = True
    rows: np.ndarray = chosen[index]
    return rows


def _limited(site: SiteImages, limit: int, rng: np.random.Generator) -> SiteImages:
    """At most `limit` images of each label, taken patient by patient."""
    patients, _, index = _majority(site)
    order = np.argsort(rng.permutation(len(patients))[index], kind="stable")
    keep = [order[site.labels[order] == label][:limit] for label in range(len(site.label_names))]
    return site.rows(np.sort(np.concatenate(keep)))


def _dirichlet(site: SiteImages, count: int, alpha: float, rng: np.random.Generator) -> list[SiteImages]:
    """`count` hospitals; each label's patients are shared out by one draw from Dirichlet(alpha)."""
    patients, majority, index = _majority(site)
    owner = np.zeros(len(patients), dtype=np.int64)
    for label in np.unique(majority):
        members = rng.permutation(np.flatnonzero(majority == label))
        cuts = np.cumsum(rng.dirichlet(np.full(count, alpha)))[:-1]
        owner[members] = np.searchsorted(cuts, (np.arange(len(members)) + 0.5) / len(members))
    if not _fill_up(owner, majority, count):
        what = f"{len(patients)} patients are too few for {count} sites with two patients of two labels each"
        raise DataError(Problem(site.name, what, "ask for fewer sites"))
    width = len(str(count))
    return [
        dataclasses.replace(site.rows(owner[index] == hospital), name=f"{site.name}-{hospital + 1:0{width}d}")
        for hospital in range(count)
    ]


def _fill_up(owner: np.ndarray, majority: np.ndarray, count: int) -> bool:
    """Move patients, in place, until each hospital has two patients (one to train, one to test) of two labels.

    A small alpha leaves some hospitals without; what is missing comes from the hospital that has most. False if there
    are too few patients.
    """
    for hospital in range(count):
        own = np.bincount(majority[owner == hospital], minlength=majority.max() + 1)
        preferred = np.lexsort((-np.bincount(majority), -own))[: min(2, len(np.unique(majority)))]
        for label in preferred:
            for _ in range(2 - own[label]):
                members = np.flatnonzero(majority == label)
                donor = np.bincount(owner[members], minlength=count).argmax()
                if (owner[members] == donor).sum() <= 2:
                    return False
                owner[members[owner[members] == donor][0]] = hospital
    return True


def _no_patient_twice(hospitals: Sequence[SiteImages]) -> None:
    owner: dict[str, str] = {}
    shared: dict[tuple[str, str], int] = {}
    for hospital in hospitals:
        for patient in np.unique(hospital.patients).tolist():
            first = owner.setdefault(patient, hospital.name)
            if first != hospital.name:
                shared[first, hospital.name] = shared.get((first, hospital.name), 0) + 1
    refuse(
        [
            Problem(f"{first} and {second}", f"{count} patient ids are in both", "rename, or make them in two calls")
            for (first, second), count in shared.items()
        ]
    )


def _named(hospitals: Sequence[SiteImages], names: Sequence[str]) -> list[SiteImages]:
    if names and len(names) != len(hospitals):
        found = ", ".join(hospital.name for hospital in hospitals)
        raise DataError(Problem("", f"{len(names)} names for {len(hospitals)} hospitals", f"in this order: {found}"))
    renamed = [dataclasses.replace(h, name=n) for h, n in zip(hospitals, names, strict=True)] if names else hospitals
    twice = {h.name for h in renamed if [o.name for o in renamed].count(h.name) > 1 or h.name == PUBLIC}
    refuse([Problem(name, "this name is reserved or given to two hospitals", "give names") for name in sorted(twice)])
    bad = [h.name for h in renamed if _slug(h.name) != h.name]
    refuse([Problem(name, "no valid site name", "use lower-case letters, digits, '-' and '_'") for name in bad])
    return list(renamed)


def _slug(text: str) -> str:
    """A site name (lower case, digits, '-', '_', at most 41) that resembles `text`."""
    return re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-_")[:41] or "site"
