"""What a start is worth at a hospital: adapt it to k labelled images, ask it about other patients.

Local use: nothing here leaves the site, and nothing here feeds a release.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from client.answers import Verdict, answers_of, error_maps, judge
from client.data.dataset import SiteData
from client.splits import (
    Split,
    patient_splits,
    rng_of,
    seed_of,
    shortage,
    support_groups,
    support_rows,
)
from common.algorithms import ALGORITHMS
from common.episodes import Batch, evenly
from common.learner import Learner
from common.models import BODY, HEAD, Network, build_model, feature_centre, parameters
from common.params import Params
from common.plan import StudyPlan
from common.starting_point import starting
from common.tasks import task_of
from common.trials import CEILING, Kind, Trial

_CHUNK = 100  # images in one forward pass
_STEPS, _BATCH, _LR = 150, 48, 1e-3  # Adam, the whole network


@dataclass(frozen=True)
class Sight:
    """One query image and what was made of it."""

    row: int  # of the data
    found: Tensor | None  # segmentation: int64 (H, W); reconstruction: float (H, W) in [0, 1]
    score: float  # anomaly: how unusual, 0 the least and 1 the most unusual of the queries; else nan


def few_shot_trials(
    start: Params | None, data: SiteData, plan: StudyPlan, *, arm: str, kind: Kind, seed: int, target: str = ""
) -> list[Trial]:
    """Adapt `start` by `plan.evaluation` to each drawn support set; one Trial per shots, split and draw.

    `start` holds the body, what else the algorithm shares and, if the plan shares it, the head; None is a random
    initialization, a fresh one in each split. `data` holds the rows to evaluate on: all of a held-out site, the test
    split of a training hospital. `target` names them, if not the site does.

    Raises DataError for a site with fewer than two patients or two labels.
    """
    trials = []
    learned = None if start is None else Learned.of(start, data, plan)
    for number, split in enumerate(patient_splits(data, plan.evaluation.splits, seed=seed)):
        here = learned or Learned.by_chance(data, split, plan, seed=seed_of(seed, "start", data.site, number))
        query = data.rows(split.query)
        for draw in range(plan.evaluation.draws):
            groups = support_groups(data, split, rng_of(seed, "draw", data.site, number, draw))
            for shots in plan.evaluation.shots:
                phi, support = here.adapted(support_rows(groups, shots))
                verdict = judge(here.learner, phi, support, query, here.inputs[split.query], plan)
                note = "; ".join(filter(None, (shortage(groups, shots), verdict.note)))
                trials.append(_trial(target or data.site, data, kind, arm, shots, number, draw, verdict, note))
    return trials


def ceiling_trials(
    start: Params, data: SiteData, plan: StudyPlan, *, kind: Kind, seed: int, target: str = ""
) -> list[Trial]:
    """The same network trained from `start` on every support patient, all parameters; one Trial per split.

    Raises DataError like `few_shot_trials`.
    """
    network = build_model(plan.model, plan.task, ways=data.ways)
    learner = Learner(network, task_of(plan, data.site))
    trials = []
    for number, split in enumerate(patient_splits(data, plan.evaluation.splits, seed=seed)):
        rng = rng_of(seed, "ceiling", data.site, number)
        rows = support_rows(support_groups(data, split, rng), len(data))
        phi = train(learner, whole_start(start, data, plan), data, rows, rng)
        query = data.rows(split.query)
        verdict = judge(learner, phi, evenly(data.inputs(rows), data.targets_at(rows)), query, query.inputs(), plan)
        trials.append(_trial(target or data.site, data, kind, CEILING, 0, number, 0, verdict, verdict.note))
    return trials


def sights(start: Params | None, data: SiteData, plan: StudyPlan, *, count: int, seed: int) -> list[Sight]:
    """What an adaptation to the lead number of shots makes of `count` query images, evenly spread by label; the first
    split and draw of `few_shot_trials`."""
    split = next(patient_splits(data, 1, seed=seed))
    learned = (
        Learned.by_chance(data, split, plan, seed=seed_of(seed, "start", data.site, 0))
        if start is None
        else Learned.of(start, data, plan)
    )
    groups = support_groups(data, split, rng_of(seed, "draw", data.site, 0, 0))
    phi, support = learned.adapted(support_rows(groups, plan.evaluation.lead_shots))
    rows, inputs = spread(data, split.query, count), learned.inputs
    answers = answers_of(learned.learner, phi, support, inputs[rows], plan)
    if plan.task.kind == "segmentation":
        return [
            Sight(row, found, float("nan")) for row, found in zip(rows.tolist(), answers.argmax(dim=1), strict=True)
        ]
    everyone = answers_of(learned.learner, phi, support, inputs[split.query], plan)
    ranks = [(everyone < score).float().mean().item() for score in answers]
    maps: list[Tensor | None] = [None] * len(rows)
    if plan.model.name == "autoencoder":
        errors = error_maps(learned.learner, phi, inputs[rows])
        maps = list(errors / errors.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12))
    return [Sight(row, found, rank) for row, found, rank in zip(rows.tolist(), maps, ranks, strict=True)]


@dataclass(frozen=True)
class Learned:
    """A start at a site: its parameters, and the network's input for each row of the data."""

    learner: Learner
    params: Params
    inputs: Tensor
    data: SiteData
    plan: StudyPlan

    @classmethod
    def of(cls, start: Params, data: SiteData, plan: StudyPlan) -> Learned:
        """Where only the head adapts, the input is the body's features, computed once for all draws."""
        network = build_model(plan.model, plan.task, ways=data.ways)
        params, learner = whole_start(start, data, plan), Learner(network, task_of(plan, data.site))
        if not _body_stays(plan):
            return cls(learner, params, data.inputs(), data, plan)
        with torch.no_grad():
            features = torch.cat([learner.features(params, chunk) for chunk in data.inputs().split(_CHUNK)])
        head = {name: value for name, value in params.items() if not name.startswith(BODY)}
        return cls(Learner(Network(nn.Identity(), network.head), learner.task), head, features, data, plan)

    @classmethod
    def by_chance(cls, data: SiteData, split: Split, plan: StudyPlan, *, seed: int) -> Learned:
        """A random initialization at its best: its features are centred on the site's own support images."""
        network = build_model(plan.model, plan.task, ways=data.ways, seed=seed)
        return cls.of(parameters(network) | feature_centre(network, data.inputs(split.support)), data, plan)

    def adapted(self, rows: Tensor) -> tuple[Params, Batch]:
        """The parameters after adaptation to the support set of these rows, and that set."""
        support = evenly(self.inputs[rows], self.data.targets_at(rows))
        if self.plan.task.kind == "anomaly":
            return self._adapted_to_healthy(support), support
        algorithm = self.plan.algorithm
        adapt = ALGORITHMS[algorithm.name].adapt
        return adapt(self.learner, self.params, support, self.plan.evaluation.adaptation, algorithm), support

    def _adapted_to_healthy(self, support: Batch) -> Params:
        """By the task's own views of healthy images; a body that stays needs none, for it is only compared with."""
        if _body_stays(self.plan):
            return self.params
        rng = rng_of(self.plan.seed, "views", len(support.inputs))
        views = evenly(*self.learner.task.views(support.inputs, support.targets, rng))
        algorithm = self.plan.algorithm
        adapt = ALGORITHMS[algorithm.name].adapt
        return adapt(self.learner, self.params, views, self.plan.evaluation.adaptation, algorithm)


def _body_stays(plan: StudyPlan) -> bool:
    """Whether an adaptation leaves the body as it is, and its features are vectors that can be kept."""
    moves = plan.evaluation.adaptation.trainable != "head" or ALGORITHMS[plan.algorithm.name].adapts_body
    return not moves and plan.model.name in ("conv4", "resnet")


def whole_start(start: Params, data: SiteData, plan: StudyPlan) -> Params:
    """Every parameter of the site's network: `start` over a zero head. Raises ValueError if the body is not whole."""
    network = build_model(plan.model, plan.task, ways=data.ways)
    fresh = parameters(network)
    taken = {name: value for name, value in start.items() if plan.model.head == "shared" or not name.startswith(HEAD)}
    if missing := [name for name in fresh if name not in taken and name.startswith(BODY)]:
        raise ValueError(f"the start lacks {', '.join(missing)}")
    known = fresh | starting(plan, network)
    return fresh | {name: value for name, value in taken.items() if name in known and value.shape == known[name].shape}


def train(learner: Learner, params: Params, data: SiteData, rows: Tensor, rng: torch.Generator) -> Params:
    """The whole network, by minibatch Adam, the rate falling to zero along a cosine."""
    network = learner.network
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a seventh less time on a CPU
    network.load_state_dict({name: value for name, value in params.items() if name in network.state_dict()})
    optimizer = torch.optim.Adam(network.parameters(), lr=_LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    for _ in range(_STEPS):
        batch = rows[torch.randperm(len(rows), generator=rng)[:_BATCH]]
        optimizer.zero_grad()
        inputs, targets = learner.task.views(data.inputs(batch), data.targets_at(batch), rng)
        learner.task.loss(network(inputs), targets).mean().backward()
        optimizer.step()
        schedule.step()
    return parameters(network)


def spread(data: SiteData, rows: Tensor, count: int) -> Tensor:
    """`count` of these rows, the labels in turn."""

    def of_label(label: int) -> Iterator[int]:
        return iter(rows[data.strata[rows] == label].tolist())

    turns = [of_label(label) for label in data.strata[rows].unique().tolist()]
    chosen: list[int] = []
    while turns and len(chosen) < count:
        turn = turns.pop(0)
        row = next(turn, None)
        if row is not None:
            chosen.append(row)
            turns.append(turn)
    return torch.tensor(chosen, dtype=torch.int64)


def _trial(
    target: str, data: SiteData, kind: Kind, arm: str, shots: int, split: int, draw: int, verdict: Verdict, note: str
) -> Trial:
    return Trial(
        target=target,
        kind=kind,
        ways=data.ways,
        chance=verdict.chance,
        arm=arm,
        shots=shots,
        split=split,
        draw=draw,
        metrics=verdict.metrics,
        note=note,
    )
