"""How a site's patients are dealt into a support pool and a query pool, and which images a support set takes.

Splits and support sets follow from (seed, site, split, draw) alone, so every start meets the same ones and differences
between starts are paired.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from client.data.dataset import SiteData
from common.errors import DataError, Problem

MAX_QUERIES = 400  # images: twenty draws stay fast, and the standard error of a share stays below 0.025
MAX_MASKS = 100  # of segmentation: an image's Dice says more than a right or wrong, and takes longer


@dataclass(frozen=True)
class Split:
    """Row numbers (int64) of a site's support pool and query pool; no patient is in both."""

    support: Tensor
    query: Tensor


@dataclass(frozen=True)
class Group:
    """Images of which a support set takes k: those of one label, or what the task has in its place."""

    name: str
    rows: Tensor  # int64, in the order in which they are taken


def objection_to(data: SiteData) -> str | None:
    """Why nothing can be measured on these images; None if something can."""
    patients, strata = len(data.patients.unique()), len(data.strata.unique())
    if data.kind == "segmentation":
        return None if patients > 1 else f"{patients} patients to evaluate on"
    healthy = len(data.patients[data.labels == 0].unique()) if data.kind == "anomaly" else 2
    if patients > 1 and strata > 1 and healthy > 1:
        return None
    among = f", {healthy} of them healthy," if data.kind == "anomaly" else ""
    return f"{patients} patients{among} and {strata} labels to evaluate on"


def patient_splits(data: SiteData, count: int, *, seed: int) -> Iterator[Split]:
    """`count` random halvings of the site's patients; a label is on both sides wherever two patients show it.

    Raises DataError for fewer than two patients or labels.
    """
    if what := objection_to(data):
        raise DataError(Problem(f"site {data.site}", what, "two of each are the least; add images or leave it out"))
    for number in range(count):
        rng = rng_of(seed, "split", data.site, number)
        supporting = torch.tensor(sorted(_support_patients(data, rng)))
        yield _split(data, torch.isin(data.patients, supporting), rng)


def patient_folds(data: SiteData, count: int, *, seed: int, repeat: int = 0) -> list[Split]:
    """Cross-validation: each patient is in the query pool of one of `count` splits, and supports the others."""
    rng = rng_of(seed, "folds", data.site, repeat)
    parts = (torch.tensor(sorted(part)) for part in _dealt(data, rng, count))
    return [_split(data, ~torch.isin(data.patients, part), rng) for part in parts]


def most_folds(data: SiteData) -> int:
    """Into so many folds the patients can be dealt with each group of a support set in every one."""
    shown = [len(data.patients[member].unique()) for _, member in _label_members(data)]
    if data.kind == "multilabel":
        shown = [count for count in shown if count]  # a finding that nobody has, or nobody lacks
    return min(shown, default=0)


def _split(data: SiteData, is_support: Tensor, rng: torch.Generator) -> Split:
    """The support pool, and as many of the other rows as are asked about."""
    query = torch.nonzero(~is_support).flatten()
    most = MAX_MASKS if data.kind == "segmentation" else MAX_QUERIES
    kept = query[torch.randperm(len(query), generator=rng)[:most]].sort().values
    return Split(torch.nonzero(is_support).flatten(), kept)


def support_groups(data: SiteData, split: Split, rng: torch.Generator) -> list[Group]:
    """For each label its support rows in random order, a patient's second image after every patient's first.

    The first k rows of each group are the support set of k shots, so a smaller set lies inside a larger one. Findings
    that may come together have a group each, and one for none of them; a segmentation has one group of all images, an
    anomaly study one of healthy images. Where the network is conditioned on modalities each has groups of its own.
    """
    groups = []
    for name, member in _members(data):
        rows = split.support[member[split.support]]
        rows = rows[torch.randperm(len(rows), generator=rng)]
        seen: Counter[int] = Counter()
        turn = []
        for patient in data.patients[rows].tolist():
            turn.append(seen[patient])
            seen[patient] += 1
        groups.append(Group(name, rows[torch.argsort(torch.tensor(turn, dtype=torch.int64), stable=True)]))
    return groups


def support_rows(groups: list[Group], shots: int) -> Tensor:
    """The support set of `shots` images of each group; an image that is in two groups is taken once."""
    rows = torch.cat([group.rows[:shots] for group in groups])
    return torch.tensor(list(dict.fromkeys(rows.tolist())), dtype=torch.int64)


def shortage(groups: list[Group], shots: int) -> str:
    """Which groups have fewer than `shots` images in the support pool; empty if none."""
    short = [group.name for group in groups if len(group.rows) < shots]
    return f"too few images of {', '.join(short)}" if short else ""


def seed_of(seed: int, *key: str | int) -> int:
    """A seed that depends on `key` alone, equal in every process."""
    return int.from_bytes(hashlib.sha256(repr((seed, *key)).encode()).digest()[:7], "big")


def rng_of(seed: int, *key: str | int) -> torch.Generator:
    """A generator of that seed."""
    return torch.Generator().manual_seed(seed_of(seed, *key))


def _members(data: SiteData) -> Iterator[tuple[str, Tensor]]:
    """(name, bool (n,)) of every group."""
    for name, member in _label_members(data):
        if data.modalities is None:
            yield name, member
            continue
        for modality in data.modalities.unique().tolist():
            yield f"{name} of modality {modality + 1}", member & (data.modalities == modality)


def _label_members(data: SiteData) -> Iterator[tuple[str, Tensor]]:
    if data.kind == "segmentation":
        yield "any kind", torch.ones(len(data), dtype=torch.bool)
    elif data.kind == "anomaly":
        yield data.label_names[0], data.labels == 0
    elif data.kind == "multilabel":
        for finding, name in enumerate(data.label_names):
            yield name, data.labels[:, finding] > 0
        yield "no finding", data.labels.sum(dim=1) == 0
    else:
        for label, name in enumerate(data.label_names):
            yield name, data.labels == label


def _support_patients(data: SiteData, rng: torch.Generator) -> set[int]:
    """Half of the patients."""
    return _dealt(data, rng, 2)[0]


def _dealt(data: SiteData, rng: torch.Generator, count: int) -> list[set[int]]:
    """The patients in `count` parts, dealt label by label from the rarest on, each to the part that lacks it most."""
    labels_of: dict[int, set[int]] = {}
    for patient, label in zip(data.patients.tolist(), data.strata.tolist(), strict=True):
        labels_of.setdefault(patient, set()).add(label)
    showing = Counter(label for labels in labels_of.values() for label in labels)
    shuffled = [sorted(labels_of)[i] for i in torch.randperm(len(labels_of), generator=rng).tolist()]
    rarity = {patient: sorted((showing[label], label) for label in labels_of[patient]) for patient in shuffled}
    tallies: list[Counter[int]] = [Counter() for _ in range(count)]
    parts: list[set[int]] = [set() for _ in range(count)]
    first = int(torch.randint(count, (), generator=rng))  # which part gets the odd patient
    for patient in sorted(shuffled, key=lambda p: rarity[p][0]):
        labels = [label for _, label in rarity[patient]]
        wants = [[tally[label] for label in labels] + [tally.total()] for tally in tallies]
        chosen = min(range(count), key=lambda part: (wants[part], (part - first) % count))
        tallies[chosen].update(labels)
        parts[chosen].add(patient)
    return parts
