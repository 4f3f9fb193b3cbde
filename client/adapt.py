"""What a start is worth at a hospital: adapt it to k labelled images per class, ask it about other patients.

Local use: nothing here leaves the site, and nothing here feeds a release. Splits and support sets follow from
(seed, site, split, draw) alone, so every start meets the same ones and differences between starts are paired.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from client.data.dataset import SiteData
from common.errors import DataError, Problem
from common.inner_loop import adapt
from common.metrics import classification_metrics
from common.models import HEAD, Network, build_model, feature_centre, parameters
from common.params import Params
from common.plan import StudyPlan
from common.trials import CEILING, Kind, Trial

MAX_QUERIES = 400  # images: twenty draws stay fast, and the standard error of a share stays below 0.025
_CHUNK = 100  # images in one forward pass

_CEILING_STEPS, _CEILING_BATCH, _CEILING_LR = 150, 48, 1e-3  # Adam


@dataclass(frozen=True)
class Split:
    """Row numbers (int64) of a site's support pool and query pool; no patient is in both."""

    support: Tensor
    query: Tensor


def few_shot_trials(
    start: Params | None, data: SiteData, plan: StudyPlan, *, arm: str, kind: Kind, seed: int
) -> list[Trial]:
    """Adapt `start` by `plan.evaluation` to each drawn support set; one Trial per shots, split and draw.

    `start` holds the body and, if the plan shares the head, the head; None is a random initialization, a fresh
    one in each split. `data` holds the rows to evaluate on: all of a held-out site, the test split of a
    training hospital.

    Raises DataError for a site with fewer than two patients or two labels.
    """
    trials = []
    learner = None if start is None else _learner(_starting_point(start, data, plan), data, plan)
    for number, split in enumerate(patient_splits(data, plan.evaluation.splits, seed=seed)):
        network, params, inputs = learner or _learner(
            _random_start(data, split, plan, seed=_seed(seed, "start", data.site, number)), data, plan
        )
        for draw in range(plan.evaluation.draws):
            order = _support_order(data, split, _rng(seed, "draw", data.site, number, draw))
            for shots in plan.evaluation.shots:
                rows = torch.cat([of_label[:shots] for of_label in order])
                phi = adapt(network, params, inputs[rows], data.labels[rows], plan.evaluation.adaptation)
                metrics, note = _judged(network, phi, inputs[split.query], data.labels[split.query])
                notes = "; ".join(filter(None, (_shortage(data, order, shots), note)))
                trials.append(_trial(data, kind, arm, shots, number, draw, metrics, notes))
    return trials


def ceiling_trials(start: Params, data: SiteData, plan: StudyPlan, *, kind: Kind, seed: int) -> list[Trial]:
    """The same network trained from `start` on every support patient, all parameters; one Trial per split.

    Raises DataError like `few_shot_trials`.
    """
    network = build_model(plan.model, plan.task, ways=data.ways)
    trials = []
    for number, split in enumerate(patient_splits(data, plan.evaluation.splits, seed=seed)):
        rng = _rng(seed, "ceiling", data.site, number)
        phi = _train(network, _starting_point(start, data, plan), data, split.support, rng)
        metrics, note = _judged(network, phi, data.normalised(split.query), data.labels[split.query])
        trials.append(_trial(data, kind, CEILING, 0, number, 0, metrics, note))
    return trials


def patient_splits(data: SiteData, count: int, *, seed: int) -> Iterator[Split]:
    """`count` random halvings of the site's patients; a label is on both sides wherever two patients show it.

    Raises DataError for fewer than two patients or labels.
    """
    if len(data.patients.unique()) < 2 or len(data.labels.unique()) < 2:
        what = f"{len(data.patients.unique())} patients and {len(data.labels.unique())} labels to evaluate on"
        raise DataError(Problem(f"site {data.site}", what, "two of each are the least; add images or leave it out"))
    for number in range(count):
        rng = _rng(seed, "split", data.site, number)
        supporting = torch.tensor(sorted(_support_patients(data, rng)))
        is_support = torch.isin(data.patients, supporting)
        query = torch.nonzero(~is_support).flatten()
        kept = query[torch.randperm(len(query), generator=rng)[:MAX_QUERIES]].sort().values
        yield Split(torch.nonzero(is_support).flatten(), kept)


def _support_patients(data: SiteData, rng: torch.Generator) -> set[int]:
    """Half of the patients, dealt label by label from the rarest on, each to the side that lacks it more."""
    labels_of: dict[int, set[int]] = {}
    for patient, label in zip(data.patients.tolist(), data.labels.tolist(), strict=True):
        labels_of.setdefault(patient, set()).add(label)
    showing = Counter(label for labels in labels_of.values() for label in labels)
    shuffled = [sorted(labels_of)[i] for i in torch.randperm(len(labels_of), generator=rng).tolist()]
    rarity = {patient: sorted((showing[label], label) for label in labels_of[patient]) for patient in shuffled}
    sides: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
    support = set()
    first = int(torch.randint(2, (), generator=rng))  # which side gets the odd patient
    for patient in sorted(shuffled, key=lambda p: rarity[p][0]):
        labels = [label for _, label in rarity[patient]]
        wants = [[side[label] for label in labels] + [side.total()] for side in sides]
        chosen = first if wants[0] == wants[1] else int(wants[1] < wants[0])
        sides[chosen].update(labels)
        if chosen == 0:
            support.add(patient)
    return support


def _support_order(data: SiteData, split: Split, rng: torch.Generator) -> list[Tensor]:
    """For each label its support rows in random order, a patient's second image after every patient's first.

    The first k rows are the support set of k shots, so a smaller set lies inside a larger one.
    """
    order = []
    for label in range(data.ways):
        rows = split.support[data.labels[split.support] == label]
        rows = rows[torch.randperm(len(rows), generator=rng)]
        seen: Counter[int] = Counter()
        turn = []
        for patient in data.patients[rows].tolist():
            turn.append(seen[patient])
            seen[patient] += 1
        order.append(rows[torch.argsort(torch.tensor(turn, dtype=torch.int64), stable=True)])
    return order


def _shortage(data: SiteData, order: list[Tensor], shots: int) -> str:
    """Which labels have fewer than `shots` images in the support pool; empty if none."""
    short = [name for name, rows in zip(data.label_names, order, strict=True) if len(rows) < shots]
    return f"too few images of {', '.join(short)}" if short else ""


def _starting_point(start: Params, data: SiteData, plan: StudyPlan) -> Params:
    """Every parameter of the site's network: `start` over a zero head. Raises ValueError if the body is not whole."""
    fresh = parameters(build_model(plan.model, plan.task, ways=data.ways))
    taken = {name: value for name, value in start.items() if plan.model.head == "shared" or not name.startswith(HEAD)}
    if missing := [name for name in fresh if name not in taken and not name.startswith(HEAD)]:
        raise ValueError(f"the start lacks {', '.join(missing)}")
    return fresh | {name: value for name, value in taken.items() if value.shape == fresh[name].shape}


def _random_start(data: SiteData, split: Split, plan: StudyPlan, *, seed: int) -> Params:
    """A random initialization at its best: its features are centred on the site's own support images."""
    network = build_model(plan.model, plan.task, ways=data.ways, seed=seed)
    return parameters(network) | feature_centre(network, data.images[split.support])


def _learner(params: Params, data: SiteData, plan: StudyPlan) -> tuple[nn.Module, Params, Tensor]:
    """A network, its parameters, and its input for each row of `data`.

    Where only the head adapts, the input is the body's features, computed once for all draws.
    """
    network, images = build_model(plan.model, plan.task, ways=data.ways), data.normalised()
    if plan.evaluation.adaptation.trainable != "head":
        return network, params, images
    network.load_state_dict(params)
    with torch.no_grad():
        features = torch.cat([network.body(chunk) for chunk in images.split(_CHUNK)])
    head = {name: value for name, value in params.items() if name.startswith(HEAD)}
    return Network(nn.Identity(), features.shape[1], data.ways), head, features


def _train(network: Network, params: Params, data: SiteData, rows: Tensor, rng: torch.Generator) -> Params:
    """Minibatch Adam, the rate falling to zero along a cosine."""
    network.load_state_dict(params)
    optimizer = torch.optim.Adam(network.parameters(), lr=_CEILING_LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _CEILING_STEPS)
    for _ in range(_CEILING_STEPS):
        batch = rows[torch.randperm(len(rows), generator=rng)[:_CEILING_BATCH]]
        optimizer.zero_grad()
        cross_entropy(network(data.normalised(batch)), data.labels[batch]).backward()
        optimizer.step()
        schedule.step()
    return parameters(network)


def _judged(network: nn.Module, phi: Params, images: Tensor, labels: Tensor) -> tuple[dict[str, float], str]:
    """Metrics, and a note if the adaptation diverged: such a network guesses."""
    probabilities = _probabilities(network, phi, images)
    if torch.isfinite(probabilities).all():
        return classification_metrics(probabilities, labels), ""
    guess = torch.full_like(probabilities, 1 / probabilities.shape[1])
    return classification_metrics(guess, labels), "the adaptation diverged and counts as guessing"


@torch.no_grad()
def _probabilities(network: nn.Module, params: Params, images: Tensor) -> Tensor:
    """(n, ways) of images (n, C, H, W)."""
    logits = [functional_call(network, params, (chunk,)) for chunk in images.split(_CHUNK)]
    return torch.cat(logits).softmax(dim=1)


def _trial(
    data: SiteData, kind: Kind, arm: str, shots: int, split: int, draw: int, metrics: dict[str, float], note: str
) -> Trial:
    return Trial(
        target=data.site,
        kind=kind,
        ways=data.ways,
        arm=arm,
        shots=shots,
        split=split,
        draw=draw,
        metrics=metrics,
        note=note,
    )


def _seed(seed: int, *key: str | int) -> int:
    """A seed that depends on `key` alone, equal in every process."""
    return int.from_bytes(hashlib.sha256(repr((seed, *key)).encode()).digest()[:7], "big")


def _rng(seed: int, *key: str | int) -> torch.Generator:
    return torch.Generator().manual_seed(_seed(seed, *key))
