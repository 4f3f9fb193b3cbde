"""Epsilon and noise: the figures of the literature and of other accountants, and the laws they obey.

The reference figures were computed with PLD (dp-accounting 0.6), PRV and RDP (Opacus 1.6); z by calibration. Other
accountants over a grid: test_accountants.py.
"""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.accounting import (
    Event,
    delta_of,
    epsilon,
    epsilon_rdp,
    noise_multiplier_for,
    plan_cost,
    queries_per_round,
)
from common.errors import PlanError
from common.plan_rules import EPISODIC

DELTA = 2e-4
rates = st.floats(0.05, 1.0)
noises = st.floats(0.8, 8.0)
counts = st.integers(1, 200)
law = settings(max_examples=5, deadline=None)


@pytest.mark.parametrize(("noise", "by_pld"), [(1.0, 14.01), (2.0, 4.58), (4.0, 1.88)])
def test_epsilon_of_500_steps(noise: float, by_pld: float) -> None:
    assert epsilon([Event(0.1, noise, 500)], DELTA) == pytest.approx(by_pld, abs=0.006)


def test_one_gaussian_query_costs_what_the_closed_form_says() -> None:
    """Balle & Wang 2018: delta(eps) = Phi(1/2z - eps z) - e^eps Phi(-1/2z - eps z)."""

    def phi(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    cost = epsilon([Event(1.0, 1.5)], DELTA)
    assert phi(1 / 3 - 1.5 * cost) - math.exp(cost) * phi(-1 / 3 - 1.5 * cost) == pytest.approx(DELTA, rel=0.01)


@pytest.mark.parametrize(
    ("budget", "patients", "noise"),
    [
        (1, 200, 4.05),
        (1, 2000, 4.89),
        (3, 200, 1.75),
        (3, 500, 1.86),
        (3, 2000, 2.01),
        (8, 500, 1.01),
    ],
)
def test_noise_for_200_steps(budget: float, patients: int, noise: float) -> None:
    delta = 1 / (10 * patients)
    solved = noise_multiplier_for(epsilon=budget, delta=delta, sample_rate=0.1, count=200)
    assert solved == pytest.approx(noise, abs=0.006)
    assert epsilon([Event(0.1, solved, 200)], delta) <= budget
    assert epsilon([Event(0.1, solved - 0.001, 200)], delta) > budget, "a step less would be enough"


def test_the_solver_agrees_with_dp_accounting() -> None:
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    def event(noise: float) -> dp_accounting.DpEvent:
        query = dp_accounting.PoissonSampledDpEvent(0.2, dp_accounting.GaussianDpEvent(noise))
        return dp_accounting.SelfComposedDpEvent(query, 90)

    relation = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
    theirs = dp_accounting.calibrate_dp_mechanism(lambda: PLDAccountant(relation, 1e-3), event, 5.0, 1e-3)
    ours = noise_multiplier_for(epsilon=5.0, delta=1e-3, sample_rate=0.2, count=90)
    assert 0 <= ours - theirs <= 0.001 + 1e-6


@law
@given(rate=rates, noise=noises, count=counts)
def test_more_noise_fewer_queries_or_a_larger_delta_cost_less(rate: float, noise: float, count: int) -> None:
    cost = epsilon([Event(rate, noise, count)], DELTA)
    assert 0 <= epsilon([Event(rate, 1.2 * noise, count)], DELTA) <= cost
    assert cost <= epsilon([Event(rate, noise, count + 5)], DELTA)
    assert epsilon([Event(rate, noise, count)], 10 * DELTA) <= cost
    assert epsilon([Event(0.8 * rate, noise, count)], DELTA) <= cost


@law
@given(rate=rates, noise=noises, count=counts, other=st.floats(1.0, 4.0))
def test_grouping_and_order_change_nothing(rate: float, noise: float, count: int, other: float) -> None:
    grouped = [Event(rate, noise, count + 1), Event(0.3, other, 2)]
    scattered = [Event(0.3, other), Event(rate, noise, count), Event(0.3, other), Event(rate, noise)]
    assert epsilon(grouped, DELTA) == epsilon(scattered, DELTA)
    assert epsilon(grouped, DELTA) >= epsilon(grouped[:1], DELTA)


def test_no_query_costs_nothing_and_needs_no_noise_to_be_solved() -> None:
    assert epsilon([], DELTA) == epsilon([Event(0.1, 1.0, 0)], DELTA) == epsilon_rdp([], DELTA) == 0.0
    assert noise_multiplier_for(epsilon=1, delta=DELTA, sample_rate=0.1, count=0) == math.inf


def test_hardly_any_noise_is_answered_at_once_and_not_called_cheap() -> None:
    assert epsilon([Event(0.5, 0.05, 1000)], DELTA) > 10_000


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.0, 1.0, 1), "sample_rate is 0.0; it must lie in (0, 1]"),
        ((1.1, 1.0, 1), "sample_rate is 1.1; it must lie in (0, 1]"),
        ((math.nan, 1.0, 1), "sample_rate is nan; it must lie in (0, 1]"),
        ((0.1, 0.0, 1), "noise_multiplier is 0.0; it must be above 0"),
        ((0.1, math.nan, 1), "noise_multiplier is nan; it must be above 0"),
        ((0.1, 1.0, -1), "count is -1; it must not be negative"),
    ],
)
def test_an_event_that_is_none_is_refused(values: tuple[float, float, int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Event(*values)


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, math.nan])
def test_a_delta_that_is_none_is_refused(delta: float) -> None:
    with pytest.raises(ValueError, match="it must lie between 0 and 1"):
        epsilon([Event(0.1, 1.0)], delta)
    with pytest.raises(ValueError, match="it must lie between 0 and 1"):
        noise_multiplier_for(epsilon=1.0, delta=delta, sample_rate=0.1, count=3)


def test_the_cost_of_a_plan(make_plan) -> None:
    plan = make_plan(rounds=4, privacy={"epsilon": 3.0})
    cost = plan_cost(plan, "alder")
    assert queries_per_round(plan) == 3, "two inner steps and the monitor"
    assert (cost.site, cost.patients, cost.queries, cost.sample_rate) == ("alder", 10, 12, 0.5)
    assert cost.delta == delta_of(plan.privacy, 10) == pytest.approx(1 / 100)
    assert cost.expected_batch == 5
    assert 2.9 < cost.epsilon <= 3.0 < cost.epsilon_rdp


def test_the_monitor_is_charged_only_where_something_is_asked(make_plan) -> None:
    silent = make_plan(privacy={"epsilon": 3.0, "monitor": False})
    local = make_plan(algorithm={"name": "local_only"})
    assert queries_per_round(silent) == 2
    assert queries_per_round(make_plan(privacy=None)) == 2
    assert queries_per_round(local) == 0
    assert plan_cost(local, "alder").epsilon == 0.0
    assert plan_cost(local, "alder").noise_multiplier == math.inf, "a query that was not charged would be drowned"


def test_fomaml_pays_for_its_query_step(make_plan) -> None:
    assert queries_per_round(make_plan(algorithm={"name": "fomaml", "inner_steps": 2})) == 4


@pytest.mark.parametrize(
    ("algorithm", "queries"),
    [
        ({"name": "maml", "inner_steps": 7, "meta_steps": 3}, 3),
        ({"name": "anil", "inner_steps": 7, "meta_steps": 3}, 3),
        ({"name": "metasgd", "inner_steps": 7, "meta_steps": 3}, 3),
        ({"name": "protonet", "meta_steps": 3}, 3),
        ({"name": "prototypes", "inner_steps": 2}, 3),
        ({"name": "mapping", "inner_steps": 2}, 3),
        ({"name": "mrmtl", "inner_steps": 2, "proximal": 0.1}, 2),
        ({"name": "transfer"}, 0),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_what_a_round_of_each_algorithm_is_charged(make_plan, algorithm: dict[str, object], queries: int) -> None:
    """Steps of an inner loop inside an episode ask nothing: the episode's whole gradient is one query."""
    trainable = "mapping" if algorithm["name"] == "mapping" else "film"
    model = {"name": "conv4", "width": 8, "trainable": trainable}
    plan = make_plan(algorithm=algorithm, model=model, evaluation={"compare": []})
    monitored = queries > 0 and algorithm["name"] not in EPISODIC  # those leave nothing adapted to score
    assert queries_per_round(plan) == queries + int(monitored)


def test_a_score_that_weighs_is_one_more_query_without_privacy(make_plan) -> None:
    assert queries_per_round(make_plan(privacy=None, outer={"weights": "score"})) == 3


def test_a_plan_without_privacy_has_no_cost(make_plan) -> None:
    assert plan_cost(make_plan(privacy=None), "alder") is None


def test_given_noise_that_costs_too_much_is_refused_with_both_figures(make_plan) -> None:
    plan = make_plan(privacy={"epsilon": 2.0, "noise_multiplier": 1.0})
    with pytest.raises(PlanError) as refused:
        plan_cost(plan, "alder")
    (problem,) = refused.value.problems
    spent = epsilon([Event(0.5, 1.0, 9)], 1 / 100)
    assert problem.where == "site alder"
    assert f"costs epsilon {spent:.2f} over 9 queries, above privacy.epsilon 2" in problem.what
    needed = float(problem.remedy.split()[1])
    assert plan_cost(make_plan(privacy={"epsilon": 2.0, "noise_multiplier": needed}), "alder").epsilon <= 2.0


def test_an_epsilon_out_of_reach_is_refused(make_plan) -> None:
    with pytest.raises(PlanError, match=r"privacy\.epsilon 1e-12 .* cannot be reached by 9 queries at sample rate 0.5"):
        plan_cost(make_plan(privacy={"epsilon": 1e-12, "delta": 1e-9}), "alder")


def test_a_round_of_a_long_study_composes_once_what_is_new(monkeypatch) -> None:
    """10 000 charges of ten studies: a further one composes its own study's queries again, and makes no distribution
    of a single query; asked again, it costs nothing."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    made, composed = [], []
    make, compose = pld.from_gaussian_mechanism, pld.PrivacyLossDistribution.self_compose
    monkeypatch.setattr(pld, "from_gaussian_mechanism", lambda z, **named: (made.append(z), make(z, **named))[1])
    monkeypatch.setattr(
        pld.PrivacyLossDistribution, "self_compose", lambda self, n: (composed.append(n), compose(self, n))[1]
    )
    events = [Event(0.031, 20.0 + study, 4) for study in range(10) for _ in range(1000)]
    before = epsilon(events, 1e-3)
    assert (len(made), composed) == (10, [4000] * 10)
    after = epsilon([*events, events[0]], 1e-3)
    assert (len(made), composed[10:]) == (10, [4004])
    assert epsilon([*events, events[0]], 1e-3) == after > before
    assert len(composed) == 11
