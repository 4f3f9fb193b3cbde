"""Small tasks drawn from public data sets: some of a set's labels, a few patients of each, one image of a patient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.episodes import Episode, evenly
from common.errors import Problem, UsageError
from common.plan import StudyPlan
from server.public_sets import PublicSet

_FEWEST, _MOST = 2, 5  # labels of a task
_PATIENTS = 4  # of a label that is used: then two labels are never short of two patients each
_QUERY = 15  # images of each label


def sets_with_tasks(sets: Sequence[PublicSet], plan: StudyPlan) -> list[PublicSet]:
    """The sets that tasks can be drawn from. Raises UsageError if there is none, or the plan does not classify."""
    if plan.task.kind != "classification":
        what = f"small tasks need one label for each image, but task.kind is {plan.task.kind!r}"
        raise UsageError(Problem(f"study {plan.study}", what, "leave out --meta-steps"))
    if usable := [public for public in sets if has_tasks(public)]:
        return usable
    what = f"no public set has {_FEWEST} labels with {_PATIENTS} patients each"
    raise UsageError(Problem("public sets", what, "add a set with more patients"))


def has_tasks(public: PublicSet) -> bool:
    """Whether enough labels are shown by enough patients."""
    return len(_usable_labels(public)) >= _FEWEST


def _usable_labels(public: PublicSet) -> Tensor:
    """int64: the labels that enough patients show."""
    enough = [
        label for label in public.labels.unique() if len(public.patients[public.labels == label].unique()) >= _PATIENTS
    ]
    return torch.tensor([int(label) for label in enough], dtype=torch.int64)


def draw_labels(public: PublicSet, rng: torch.Generator) -> Tensor:
    """A random few of the set's usable labels, sorted."""
    labels = _usable_labels(public)
    ways = int(torch.randint(_FEWEST, min(_MOST, len(labels)) + 1, (), generator=rng))
    return labels[torch.randperm(len(labels), generator=rng)[:ways]].sort().values


def patients_of(public: PublicSet, labels: Tensor, rng: torch.Generator) -> list[Tensor]:
    """Rows of each label in random order, every patient in one of them and there once; at least two rows of each."""
    rows = torch.isin(public.labels, labels).nonzero().flatten()
    rows = rows[torch.randperm(len(rows), generator=rng)]
    _, who = public.patients[rows].unique(return_inverse=True)
    first = torch.full((int(who.max()) + 1,), len(rows)).scatter_reduce(0, who, torch.arange(len(rows)), "amin")
    rows = rows[first.sort().values]
    groups = [rows[public.labels[rows] == label] for label in labels]
    return groups if min(map(len, groups)) >= 2 else patients_of(public, labels, rng)


def draw_episode(sets: Sequence[PublicSet], shots: Sequence[int], rng: torch.Generator) -> Episode:
    """A random task of a random set, seen in random views; targets are 0 .. ways - 1. No patient is on both sides."""
    public = sets[int(torch.randint(len(sets), (), generator=rng))]
    groups = patients_of(public, draw_labels(public, rng), rng)
    wanted = shots[int(torch.randint(len(shots), (), generator=rng))]
    count = min(wanted, *(len(group) - 1 for group in groups))
    sides = ([group[:count] for group in groups], [group[count : count + _QUERY] for group in groups])
    support, query = (evenly(public.views(torch.cat(side), rng), _numbered(side)) for side in sides)
    return Episode(support, query)


def _numbered(groups: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.full((len(group),), number) for number, group in enumerate(groups)])
