"""The weighted mean: a law of the plan's constants, whatever order the sites answer in."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.accounting import plan_cost
from common.plan import StudyPlan
from common.records import SiteReply
from server import aggregation
from server.aggregation import RunningMean, reason_to_reject, site_weights, weight_of

TEMPLATE = {"body.weight": (2, 3), "body.bias": (3,)}
VALUES = st.floats(-1e3, 1e3, width=32)
UPDATES = st.lists(st.lists(VALUES, min_size=9, max_size=9), min_size=1, max_size=6)


def update_of(values: list[float]) -> dict[str, np.ndarray]:
    array = np.array(values, dtype=np.float32)
    return {"body.weight": array[:6].reshape(2, 3), "body.bias": array[6:]}


def mean_of(updates: list[list[float]], weights: list[float]) -> np.ndarray:
    mean = RunningMean(TEMPLATE)
    for values, weight in zip(updates, weights, strict=True):
        mean.add(update_of(values), weight=weight)
    return np.concatenate([value.numpy().ravel() for value in mean.mean().values()])


@settings(deadline=None)
@given(UPDATES, st.randoms(use_true_random=False))
def test_the_order_of_arrival_does_not_matter(updates, random):
    weights = [random.uniform(0.1, 10) for _ in updates]
    order = list(range(len(updates)))
    random.shuffle(order)
    shuffled = mean_of([updates[i] for i in order], [weights[i] for i in order])
    assert shuffled == pytest.approx(mean_of(updates, weights), abs=1e-6, rel=1e-6)


@settings(deadline=None)
@given(st.lists(VALUES, min_size=9, max_size=9), st.lists(st.floats(0.01, 100), min_size=1, max_size=5))
def test_equal_updates_are_their_own_mean(values, weights):
    assert mean_of([values] * len(weights), weights) == pytest.approx(np.array(values, dtype=np.float32), rel=1e-6)


@settings(deadline=None)
@given(UPDATES, st.floats(0.01, 100))
def test_only_the_ratio_of_weights_counts(updates, factor):
    weights = [1.0 + i for i in range(len(updates))]
    scaled = mean_of(updates, [factor * weight for weight in weights])
    assert scaled == pytest.approx(mean_of(updates, weights), abs=1e-4, rel=1e-5)


def test_the_closed_form():
    assert mean_of([[0.0] * 9, [4.0] * 9], [1.0, 3.0]) == pytest.approx(3.0)


def test_zero_stays_zero():
    assert not mean_of([[0.0] * 9] * 3, [0.1, 0.2, 0.7]).any()


def test_no_reply_has_no_mean():
    with pytest.raises(ValueError, match="the mean of no update"):
        RunningMean(TEMPLATE).mean()


SITES = {name: {"labels": "lesion", "patients": n} for name, n in (("alder", 10), ("birch", 20), ("cedar", 70))}


@settings(deadline=None)
@given(st.sets(st.sampled_from(sorted(SITES)), min_size=1), st.sampled_from(["equal", "patients"]))
def test_weights_sum_to_one_over_whoever_is_asked_about(sites, rule):
    weights = site_weights(_plan(weights=rule), sites)
    assert weights.keys() == sites
    assert math.fsum(weights.values()) == pytest.approx(1)


def test_weights_by_rule():
    assert site_weights(_plan(weights="equal"), SITES) == pytest.approx(dict.fromkeys(SITES, 1 / 3))
    assert site_weights(_plan(weights="patients"), SITES) == pytest.approx({"alder": 0.1, "birch": 0.2, "cedar": 0.7})


def test_precision_is_the_inverse_variance_of_the_noise(monkeypatch):
    """(q N / z)^2, at q = 0.2."""
    plan = _plan(weights="precision", privacy={"epsilon": 50.0, "noise_multiplier": 4.0})
    assert site_weights(plan, SITES) == pytest.approx({"alder": 1 / 54, "birch": 4 / 54, "cedar": 49 / 54})
    cost = plan_cost(plan, "alder")
    noise = {"alder": 1.0, "birch": 4.0, "cedar": math.inf}
    monkeypatch.setattr(aggregation, "plan_cost", lambda plan, site: replace(cost, noise_multiplier=noise[site]))
    assert site_weights(plan, ["alder", "birch"]) == pytest.approx({"alder": 16 / 17, "birch": 1 / 17})


def test_precision_where_nothing_is_asked():
    plan = _plan(weights="precision", algorithm={"name": "local_only"})
    assert site_weights(plan, SITES) == pytest.approx(dict.fromkeys(SITES, 1 / 3))


@pytest.mark.parametrize(("score", "weight"), [(0.5, 0.25), (1.0, 0.5), (0.005, 0.005), (0.0, 0.005)])
def test_a_score_multiplies_the_weight_and_never_makes_it_zero(score, weight):
    """Two sites of equal weight; noise may have made a score 0."""
    plan = _plan(weights="score")
    own = site_weights(plan, ["alder", "birch"])["alder"]
    assert own == 0.5
    assert weight_of(plan, replace(GOOD, accuracy=score), own) == pytest.approx(weight)


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=5))
def test_weights_by_score_are_proportional_to_the_scores(scores):
    """The mean of updates 0, 1, 2 .. is that of their numbers, each counted by its score."""
    plan, mean = _plan(weights="score"), RunningMean(TEMPLATE)
    for number, score in enumerate(scores):
        reply = replace(GOOD, update=update_of([float(number)] * 9), accuracy=score)
        mean.add(reply.update, weight=weight_of(plan, reply, 1 / len(scores)))
    wanted = sum(number * score for number, score in enumerate(scores)) / sum(scores)
    assert mean.mean()["body.bias"].numpy() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("weights", ["equal", "patients", "precision"])
def test_only_weights_by_score_look_at_the_score(weights):
    assert weight_of(_plan(weights=weights), replace(GOOD, accuracy=0.1), 0.3) == 0.3


def _plan(*, weights: str, **changes):
    plan = {
        "study": "tiny",
        "task": {"kind": "classification", "image_size": 16, "label_sets": {"lesion": ["healthy", "lesion"]}},
        "sites": SITES,
        "algorithm": {"name": "reptile", "inner_steps": 1},
        "outer": {"weights": weights},
        "rounds": 2,
        "quorum": 1,
        "privacy": {"epsilon": 3.0},
    }
    return StudyPlan.model_validate(plan | changes)


GOOD = SiteReply(site="alder", code="ok", plan_digest="d", round=3, update=update_of([1.0] * 9))


def reason(reply: SiteReply, *, scored: bool = False) -> str | None:
    return reason_to_reject(reply, site="alder", plan_digest="d", round=3, template=TEMPLATE, scored=scored)


def test_a_good_reply_is_accepted():
    assert reason(GOOD) is None


@pytest.mark.parametrize("score", [math.nan, -0.1, 1.1])
def test_a_reply_without_a_score_is_rejected_where_it_would_be_its_weight(score):
    reply = replace(GOOD, accuracy=score)
    assert reason(reply) is None
    assert reason(reply, scored=True) == "the reply has no score between 0 and 1, which would be its weight"
    assert reason(replace(GOOD, accuracy=0.7), scored=True) is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"site": "birch"}, "the reply names another site"),
        ({"plan_digest": "e"}, "the reply belongs to another plan"),
        ({"round": 2}, "the reply is for round 2"),
        ({"epsilon": -1.0}, "epsilon, seconds or accuracy is not a finite number"),
        ({"accuracy": math.inf}, "epsilon, seconds or accuracy is not a finite number"),
        ({"seconds": math.nan}, "epsilon, seconds or accuracy is not a finite number"),
        ({"update": {}}, "the update's names differ from the shared parameters' in 2, as 'body.bias'"),
        (
            {"update": {**GOOD.update, "head.bias": np.zeros(2, np.float32)}},
            "the update's names differ from the shared parameters' in 1, as 'head.bias'",
        ),
        (
            {"update": {**GOOD.update, "body.bias": np.zeros((3, 1), np.float32)}},
            "body.bias has shape (3, 1), not (3,)",
        ),
        (
            {"update": {**GOOD.update, "body.bias": np.array([0, np.nan, 0], np.float32)}},
            "body.bias is not finite",
        ),
        (
            {"update": {**GOOD.update, "body.bias": np.array([0, np.inf, 0], np.float32)}},
            "body.bias is not finite",
        ),
    ],
)
def test_a_bad_reply_is_rejected_with_its_reason(change, expected):
    assert reason(replace(GOOD, **change)) == expected
