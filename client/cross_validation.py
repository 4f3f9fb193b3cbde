"""What a meta-initialization gains at this hospital, measured on patients who were in no support set that answered.

    for each repeat, each fold:   k images of each label of the other folds' patients  ->  answers about the fold's
    "meta"     the meta-initialization, adapted
    "random"   a random initialization, adapted alike: same images, same choice of rate and steps
    "scratch"  a random initialization, the whole network trained by Adam on the same images

Rate and steps are chosen on inner folds of the support set itself, so nothing but those k images builds a model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from client.adapt import Learned, train
from client.answers import answers_of, judge
from client.calibration import nearest_distance, pooled
from client.data.dataset import SiteData
from client.splits import Split, most_folds, patient_folds, rng_of, seed_of, support_groups, support_rows
from common.episodes import Batch, evenly
from common.errors import DataError, Problem
from common.learner import Learner
from common.models import build_model, feature_centre, parameters
from common.params import Params
from common.plan import AdaptationSpec, StudyPlan
from common.tasks import task_of
from common.trials import Estimate, interval

META, RANDOM, SCRATCH = "meta", "random", "scratch"
ARMS = {
    META: "the meta-initialization, adapted",
    RANDOM: "a random initialization, adapted alike",
    SCRATCH: "the whole network trained from scratch",
}
REPEATS, FOLDS, _INNER_FOLDS = 2, 5, 3
_RATES, _SHARES = (1.0, 0.3, 3.0), (1.0, 0.5, 0.25)  # of the plan's rate and steps; the plan's own come first

Watch = Callable[[float, str], object]  # share of the work that is done, and what comes next


@dataclass(frozen=True)
class Fold:
    """What one arm did in one fold of one repeat."""

    arm: str
    repeat: int
    number: int
    metrics: dict[str, float]
    chance: float
    chosen: AdaptationSpec | None  # None: from scratch
    note: str


@dataclass(frozen=True)
class OutOfFold:
    """What adapted meta-initializations answered about patients whom they had not seen; each row at most once."""

    rows: Tensor  # int64 (n,)
    answers: Tensor  # as `client.answers.answers_of`
    distances: Tensor  # (n,) to the nearest support image
    folds: Tensor  # int64 (n,)


@dataclass(frozen=True)
class CrossValidation:
    folds: tuple[Fold, ...]
    count: int  # folds in each repeat
    seen: OutOfFold  # of the first repeat

    def metric(self, arm: str, name: str) -> Estimate:
        """Mean and 95 % interval over the folds."""
        return self._interval([value for value in self._values(arm, name) if not math.isnan(value)])

    def gain(self, over: str, name: str) -> Estimate:
        """What META has more than another arm in the same folds."""
        pairs = zip(self._values(META, name), self._values(over, name), strict=True)
        return self._interval([own - other for own, other in pairs if not math.isnan(own - other)])

    def _values(self, arm: str, name: str) -> list[float]:
        return [fold.metrics[name] for fold in self.folds if fold.arm == arm]

    def _interval(self, values: Sequence[float]) -> Estimate:
        return interval(values, overlap=1 / (self.count - 1))


def cross_validate(start: Params, data: SiteData, plan: StudyPlan, *, shots: int, watch: Watch) -> CrossValidation:
    """All arms on the same folds.

    Raises DataError if a label is shown by a single patient: nobody is left to ask.
    """
    count = _fold_count(data)
    steps = [(repeat, number) for repeat in range(REPEATS) for number in range(count)]
    ready = Learned.of(start, data, plan)  # where the body stays, its features are computed once
    folds, seen = [], []
    for done, (repeat, number) in enumerate(steps):
        split = patient_folds(data, count, seed=plan.seed, repeat=repeat)[number]
        key = (data.site, repeat, number)
        rows = support_rows(support_groups(data, split, rng_of(plan.seed, "support", *key)), shots)
        for place, (arm, model) in enumerate(_models(ready, rows, plan.seed, key)):
            watch((done + place / len(ARMS)) / len(steps), f"fold {done + 1} of {len(steps)}: {ARMS[arm]}")
            learned, phi, support, chosen = model()
            query, inputs = data.rows(split.query), learned.inputs[split.query]
            verdict = judge(learned.learner, phi, support, query, inputs, plan)
            folds.append(Fold(arm, repeat, number, verdict.metrics, verdict.chance, chosen, verdict.note))
            if arm == META and repeat == 0:
                seen.append(_seen(learned, phi, support, split.query, number))
    return CrossValidation(tuple(folds), count, _joined(seen))


def adapted_here(learned: Learned, rows: Tensor) -> tuple[Params, Batch, AdaptationSpec]:
    """The parameters adapted to the support set of these rows, that set, and the rate and steps chosen on it."""
    spec = choose(learned, rows)
    phi, support = _with(learned, spec).adapted(rows)
    return phi, support, spec


def choose(learned: Learned, rows: Tensor) -> AdaptationSpec:
    """The rate, and after how many steps to stop: the least loss of patients left out of the support set in turn.

    The plan's own where the set is too small to leave somebody out, or nothing in it says what is right (anomalies).
    """
    planned, support = learned.plan.evaluation.adaptation, learned.data.rows(rows)
    count = min(_INNER_FOLDS, most_folds(support))
    if learned.plan.task.kind == "anomaly" or count < 2:
        return planned
    inner = patient_folds(support, count, seed=learned.plan.seed)
    return min(_candidates(planned), key=lambda spec: _left_out_loss(_with(learned, spec), rows, inner))


def _left_out_loss(learned: Learned, rows: Tensor, inner: Sequence[Split]) -> float:
    """The mean over the folds; inf if it is not finite."""
    losses = []
    for split in inner:
        phi, _ = learned.adapted(rows[split.support])
        asked = rows[split.query]
        with torch.no_grad():
            outputs = learned.learner.outputs(phi, learned.inputs[asked])
            losses.append(float(learned.learner.loss(outputs, evenly(outputs, learned.data.targets_at(asked)))))
    loss = math.fsum(losses) / len(losses)
    return loss if math.isfinite(loss) else math.inf


def _candidates(planned: AdaptationSpec) -> list[AdaptationSpec]:
    found = {}
    for rate in _RATES:
        for share in _SHARES:
            head = None if planned.head_lr is None else planned.head_lr * rate
            steps = max(1, round(planned.steps * share))
            change = {"lr": planned.lr * rate, "head_lr": head, "steps": steps}
            found[rate, steps] = planned.model_copy(update=change)
    return list(found.values())


def _with(learned: Learned, spec: AdaptationSpec) -> Learned:
    evaluation = learned.plan.evaluation.model_copy(update={"adaptation": spec})
    return dataclasses.replace(learned, plan=learned.plan.model_copy(update={"evaluation": evaluation}))


_Model = tuple[Learned, Params, Batch, AdaptationSpec | None]


def _models(
    ready: Learned, rows: Tensor, seed: int, key: tuple[str, int, int]
) -> Iterator[tuple[str, Callable[[], _Model]]]:
    """The arms, each as what makes its model when it is called."""
    data, plan = ready.data, ready.plan

    def adapted(learned: Learned) -> _Model:
        phi, support, spec = adapted_here(learned, rows)
        return learned, phi, support, spec

    def by_chance() -> Learned:
        return Learned.by_chance(data, Split(rows, rows), plan, seed=seed_of(seed, "start", *key))

    yield META, lambda: adapted(ready)
    yield RANDOM, lambda: adapted(by_chance())
    yield SCRATCH, lambda: _from_scratch(data, plan, rows, seed, key)


def _from_scratch(data: SiteData, plan: StudyPlan, rows: Tensor, seed: int, key: tuple[str, int, int]) -> _Model:
    network = build_model(plan.model, plan.task, ways=data.ways, seed=seed_of(seed, "start", *key))
    begin = parameters(network) | feature_centre(network, data.inputs(rows))
    learner = Learner(network, task_of(plan, data.site))
    phi = train(learner, begin, data, rows, rng_of(seed, "scratch", *key))
    learned = Learned(learner, phi, data.inputs(), data, plan)
    return learned, phi, evenly(learned.inputs[rows], data.targets_at(rows)), None


def features_of(learned: Learned, phi: Params, inputs: Tensor) -> Tensor:
    """(n, F) of inputs as `learned` has them."""
    with torch.no_grad():
        return torch.cat([pooled(learned.learner.features(phi, chunk)) for chunk in inputs.split(100)])


def _seen(learned: Learned, phi: Params, support: Batch, query: Tensor, fold: int) -> OutOfFold:
    inputs = learned.inputs[query]
    answers = answers_of(learned.learner, phi, support, inputs, learned.plan)
    away = nearest_distance(features_of(learned, phi, inputs), features_of(learned, phi, support.inputs))
    return OutOfFold(query, answers, away, torch.full_like(query, fold))


def _joined(parts: Sequence[OutOfFold]) -> OutOfFold:
    columns = zip(*((p.rows, p.answers, p.distances, p.folds) for p in parts), strict=True)
    return OutOfFold(*(torch.cat(column) for column in columns))


def _fold_count(data: SiteData) -> int:
    count = min(FOLDS, most_folds(data))
    if count < 2:
        what = "a label is shown by a single patient, or by none"
        remedy = "add images of other patients, or ask about fewer labels"
        raise DataError(Problem(f"site {data.site}", what, remedy))
    return count
