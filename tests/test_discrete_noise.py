"""The discrete Gaussian: its distribution, its lattice, and the private queries under it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import logsumexp

import client.discrete_noise
import client.private_data
from client.discrete_noise import Lattice, _exp_minus, _exp_minus_half_square, discrete_gaussian
from client.grant import Grant
from client.optimizer import PatientDPOptimizer, os_generator
from client.private_data import Mechanism, Patients, PrivateDataset
from client.selftest import require_self_test
from common.accounting import plan_cost
from common.params import Params, norm, subtract
from common.plan import StudyPlan
from common.tasks import TASKS
from tests.conftest import PlanMaker, SiteMaker
from tests.test_disclosure import Site
from tests.test_private_queries import BATCH, CLIP, NOISE, constant_direction, network, reference, site

CERTAIN = 1e-7  # a right sampler fails a check as often


def exact(deviation: int, reach: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """(n, p(n)) for |n| <= reach * deviation."""
    n = np.arange(-reach * deviation, reach * deviation + 1)
    weights = np.exp(-(n**2) / (2 * deviation**2))
    return n, weights / weights.sum()


def fits(sample: np.ndarray, deviation: int) -> bool:
    """Chi-square of the sample against the exact probabilities; what is rare is one cell."""
    n, p = exact(deviation)
    counts = np.array([np.count_nonzero(sample == value) for value in n])
    often = p * len(sample) >= 10
    observed = np.append(counts[often], len(sample) - counts[often].sum())
    wanted = np.append(p[often], 1 - p[often].sum()) * len(sample)
    return bool(stats.chisquare(observed, wanted).pvalue > CERTAIN)


@pytest.mark.parametrize("deviation", [1, 2, 5, 16])
def test_the_distribution_is_the_exact_one(deviation: int) -> None:
    assert fits(discrete_gaussian(deviation, 100_000), deviation)


def test_other_distributions_are_told_from_it() -> None:
    """A rounded normal at s = 1 differs by 0.0165 in total variation; one of a little more spread by less."""
    rng = np.random.default_rng(0)
    assert not fits(np.round(rng.normal(0, 1, 100_000)).astype(np.int64), 1)
    assert not fits(discrete_gaussian(5, 100_000) * 2, 5)
    sample = discrete_gaussian(16, 100_000)
    assert not fits(sample[sample != 0], 16)


@pytest.mark.parametrize(
    ("name", "bug"),
    [
        ("_below", lambda bound, count: np.zeros(count, dtype=np.int64)),
        ("_exp_minus", lambda n, m: np.random.default_rng(1).random(len(n)) < 0.5),
        ("_exp_minus_half_square", lambda n, s: np.ones(len(n), dtype=bool)),  # the Laplace
    ],
    ids=["stuck", "coins", "laplace"],
)
def test_a_planted_bug_is_caught(name: str, bug: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    honest = client.discrete_noise._below
    if name == "_below":  # the sign never turns
        bug = lambda bound, count: honest(bound, count) if bound != 2 else np.zeros(count, dtype=np.int64)  # noqa: E731
    monkeypatch.setattr(client.discrete_noise, name, bug)
    assert not fits(discrete_gaussian(5, 100_000), 5)


@pytest.mark.parametrize(("n", "m"), [(0, 3), (1, 3), (3, 3), (2**34 - 1, 2**35)])
def test_coins_of_exp_minus(n: int, m: int) -> None:
    heads = int(_exp_minus(np.full(50_000, n), m).sum())
    assert stats.binomtest(heads, 50_000, math.exp(-n / m)).pvalue > CERTAIN


@pytest.mark.parametrize("n", [0, 1, 3, 4, 7, 10])
def test_coins_of_exp_minus_half_a_square(n: int) -> None:
    heads = int(_exp_minus_half_square(np.full(50_000, n), 3).sum())
    assert stats.binomtest(heads, 50_000, math.exp(-(n**2) / 18)).pvalue > CERTAIN


def test_moments_and_independence_on_a_fine_lattice() -> None:
    count = 60_000
    z = discrete_gaussian(2**34 + 12345, count) / (2**34 + 12345)
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - mean) < 5.5 * math.sqrt(variance / count)
    assert stats.kstest(z, "norm").pvalue > CERTAIN
    assert abs((z[1:] * z[:-1]).mean()) < 5.5 / math.sqrt(count)


def test_every_number_comes_from_the_operating_systems_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same entropy gives the same numbers, and other entropy others: there is no generator beside it."""
    drawn = []
    for seed in (0, 0, 1):
        monkeypatch.setattr(os, "urandom", np.random.default_rng(seed).bytes)
        torch.manual_seed(len(drawn))
        drawn.append(discrete_gaussian(2**34, 64))
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not (drawn[0] == drawn[2]).any()


@pytest.mark.parametrize("deviation", [0, -1, 2**41])
def test_a_deviation_out_of_range_is_refused(deviation: int) -> None:
    with pytest.raises(ValueError, match=r"it must lie in 1 \.\. 2\^40"):
        discrete_gaussian(deviation, 1)


# ---- the lattice -----------------------------------------------------------------------------------------------------


@given(st.floats(1e-12, 1e9))
def test_the_lattice_is_a_power_of_two_and_the_noise_not_less_than_asked_for(std: float) -> None:
    lattice = Lattice(std)
    assert math.frexp(lattice.step)[0] == 0.5
    assert 2**34 <= lattice.deviation <= 2**35
    assert 0 <= Fraction(lattice.deviation) * Fraction(lattice.step) - Fraction(std) < Fraction(lattice.step)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3000), st.floats(0.1, 10.0), st.floats(0.3, 50.0), st.floats(1e-4, 1e4), st.integers(0, 2**31))
def test_a_rounded_contribution_is_within_the_radius_in_exact_arithmetic(
    numbers: int, radius: float, noise_multiplier: float, size: float, seed: int
) -> None:
    lattice = Lattice(noise_multiplier * radius)
    values = torch.randn(numbers, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * size
    limit = lattice.bound(radius, numbers)
    rounded = lattice.rounded(values * min(1.0, limit / float(values.norm())))
    steps = [Fraction(value) / Fraction(lattice.step) for value in rounded.tolist()]
    assert all(step.denominator == 1 for step in steps)
    assert sum(step * step for step in steps) * Fraction(lattice.step) ** 2 <= Fraction(radius) ** 2


def test_without_the_slack_rounding_leaves_the_radius() -> None:
    """The law above can fail: many numbers on a coarse lattice, all a little above half a step."""
    lattice, numbers = Lattice(2.0**34), 10_000  # step 1
    values = torch.full((numbers,), 0.51, dtype=torch.float64)
    assert float(lattice.rounded(values).norm()) > 1.9 * float(values.norm())
    with pytest.raises(ValueError, match="too coarse for 10000 numbers within 60"):
        lattice.bound(60.0, numbers)


@pytest.mark.parametrize("deviation", [2, 8, 64])
def test_the_rounded_normal_is_as_near_as_the_accounting_says(deviation: int) -> None:
    """Total variation at most 0.0202 / s^2, which is 7e-23 on the lattice's 2^34."""
    n, p = exact(deviation)
    above = stats.norm.sf(np.abs(n) - 0.5, scale=deviation) - stats.norm.sf(np.abs(n) + 0.5, scale=deviation)
    distance = 0.5 * np.abs(p - above).sum()
    assert 0.018 / deviation**2 < distance < 0.0202 / deviation**2
    assert 0.0202 / 2.0**68 < 7e-23


@pytest.mark.parametrize("rate", [0.05, 0.5])
@pytest.mark.parametrize(("deviation", "shift"), [(2, 1), (4, 4), (8, 3)])
def test_subsampled_renyi_orders_are_the_normals_at_most(deviation: int, shift: int, rate: float) -> None:
    """Both directions, by sums over the lattice, against the normal's closed form (Mironov 2019, integer orders)."""
    n = np.arange(-60 * deviation, 60 * deviation + 1)
    total = logsumexp(-(n**2) / (2 * deviation**2))
    there, moved = (-((n - by) ** 2) / (2 * deviation**2) - total for by in (0, shift))
    mixed = np.logaddexp(math.log(1 - rate) + there, math.log(rate) + moved)
    for order in (2, 3, 8, 16):
        terms = [
            math.comb(order, k)
            * (1 - rate) ** (order - k)
            * rate**k
            * math.exp(k * (k - 1) * shift**2 / 2 / deviation**2)
            for k in range(order + 1)
        ]
        bound = math.log(math.fsum(terms)) / (order - 1)
        for one, other in ((mixed, there), (there, mixed)):
            found = logsumexp(order * one - (order - 1) * other) / (order - 1)
            assert found <= bound * (1 + 1e-9)


# ---- private queries under it ----------------------------------------------------------------------------------------


def discrete(data: Any, net: Any, **changes: Any) -> PrivateDataset:
    values = {"sample_rate": 1.0, "noise_multiplier": NOISE, "clip": CLIP, "batch": BATCH, "max_images": 99}
    mechanism = Mechanism(**{**values, "discrete": True, **changes})
    return PrivateDataset(Patients(data, net, TASKS["classification"], chunk_images=5), mechanism, Grant(1000))


def nobody() -> Any:
    return site([1]).rows(torch.zeros(0, dtype=torch.int64))


def queries(private: PrivateDataset, params: Params) -> dict[str, torch.Tensor]:
    """Each query's numbers over the std that its noise must have; on nobody, pure noise."""
    mechanism = private._mechanism
    assert isinstance(mechanism, Mechanism)
    z, b = mechanism.noise_multiplier, mechanism.batch
    gradient = torch.cat([v.flatten() for v in private.gradient(params).values()]) / (z * mechanism.clip / b)
    episodes = private.episode_gradient(params, constant_direction)
    pulled = torch.cat([v.flatten() for v in episodes.values()]) / (2 * z * mechanism.clip / mechanism.episodes)
    sums = private.class_sums({})
    classes = torch.cat([sums.features.flatten() / sums.std, sums.counts * b / (z * 2**0.5)])
    many = torch.cat([private.statistic({}, lambda o, y: torch.zeros(len(y), 40)) for _ in range(3)])
    return {"gradient": gradient, "episodes": pulled, "classes": classes, "statistic": many}


def test_every_query_on_nobody_is_noise_of_the_declared_scale() -> None:
    net, params = network()
    found = queries(discrete(nobody(), net), params)
    for name in ("gradient", "episodes", "classes"):
        values = found[name].double()
        low, high = stats.chi2.ppf([5e-10, 1 - 5e-10], len(values))
        assert low < float(values.square().sum()) < high, name
    private = discrete(nobody(), net, batch=1e6)
    values = (private.statistic({}, lambda o, y: torch.zeros(len(y), 200)).double() - 0.5) * 1e6
    low, high = stats.chi2.ppf([5e-10, 1 - 5e-10], 200)
    assert low < float((values / (NOISE * 200**0.5 / 2)).square().sum()) < high


def test_a_gradient_is_that_of_the_formula() -> None:
    net, params = network()
    data = site([1, 4, 2, 12, 1])
    got = discrete(data, net, noise_multiplier=1e-9).gradient(params)
    assert norm(subtract(got, reference(data, net, params, clip=CLIP, batch=BATCH))) < 1e-5


def _on_lattice(values: torch.Tensor, step: float) -> bool:
    return bool(torch.equal(torch.round(values / step) * step, values))


def test_what_leaves_the_optimizer_is_a_multiple_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sum and noise, before they are divided by the public B; the normal path is none."""
    net, params = network("film")
    released: list[bool] = []
    honest = PatientDPOptimizer.add_noise

    def watched(self: PatientDPOptimizer) -> None:
        step = Lattice(self.noise_multiplier * self.max_grad_norm).step
        released.append(all(_on_lattice(p.summed_grad.double(), step) for p in self.params))  # type: ignore[attr-defined]
        honest(self)

    monkeypatch.setattr(PatientDPOptimizer, "add_noise", watched)
    for on in (True, False):
        discrete(site([1, 3, 2]), net, discrete=on, noise_multiplier=8.0).gradient(params)
    assert released == [True, False]
    assert _on_lattice(Lattice(0.3).sample((50,)), Lattice(0.3).step)


def test_the_sum_does_not_depend_on_the_order_of_patients() -> None:
    lattice = Lattice(0.37)
    parts = lattice.rounded(torch.randn(5000, 7, dtype=torch.float64))
    assert torch.equal(parts.sum(dim=0), parts.flip(0).sum(dim=0))
    plain = torch.randn(5000, 7)
    assert not torch.equal(plain.sum(dim=0), plain[torch.randperm(5000)].sum(dim=0))


@pytest.mark.parametrize("images", [1, 12])
def test_a_patient_moves_each_query_by_its_sensitivity_at_most(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly, before noise: the sum is a sum of contributions, each within the radius."""
    monkeypatch.setattr(Lattice, "sample", lambda self, shape: torch.zeros(tuple(shape), dtype=torch.float64))
    net, params = network()
    params["head.weight"] = params["head.weight"] * 50
    data = site([1, 3, images])
    absent = data.rows(torch.nonzero(data.patients < 2).flatten())
    moved = norm(subtract(discrete(data, net).gradient(params), discrete(absent, net).gradient(params)))
    assert 0.9 * CLIP < moved * BATCH <= CLIP * (1 + 1e-6)
    one, other = (discrete(d, net, feature_clip=1e-3).class_sums({}) for d in (data, absent))
    change = torch.cat([(one.features - other.features).flatten() / 1e-3, one.counts - other.counts])
    assert 0.5 < float(change.norm()) * BATCH / 2**0.5 <= 1 + 1e-5


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_its_cost_is_about_what_its_module_says() -> None:
    """Seconds of a core for a million numbers, and its ratio to the normal's."""
    import time

    began = time.process_time()
    discrete_gaussian(2**34, 1_000_000)
    exact_s, began = time.process_time() - began, time.process_time()
    torch.normal(0.0, 1.0, (1_000_000,), generator=os_generator())
    ratio = exact_s / (time.process_time() - began)
    assert exact_s < 10
    assert 20 < ratio < 2000


@pytest.mark.parametrize("algorithm", ["reptile", "maml", "prototypes"])
def test_a_plan_with_discrete_noise_draws_no_normal_number(
    make_site: SiteMaker, make_plan: PlanMaker, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    plan = make_plan(
        algorithm={"name": algorithm, "inner_steps": 1, "episodes": 2},
        privacy={"epsilon": 100.0, "delta": 0.01, "noise_multiplier": 4.0, "noise": "discrete"},
        evaluation={"compare": []},
    )
    assert plan_cost(plan, "alder") == plan_cost(make_plan(**plan_without_noise(plan)), "alder")  # the same charge
    require_self_test()  # of the normal noise, which a process does once
    monkeypatch.setattr(torch, "normal", lambda *_, **__: pytest.fail("a normal number was drawn"))
    reply = Site(make_site("alder", epsilon=200.0), plan).replies(rounds=1)[1]
    assert (reply.code, reply.reason) == ("ok", "")
    assert all(np.isfinite(value).all() and value.any() for value in reply.update.values())


def plan_without_noise(plan: StudyPlan) -> dict[str, Any]:
    """The sections in which it differs from the fixture's plan, with normal noise."""
    fields = plan.model_dump(mode="json")
    return {name: fields[name] for name in ("algorithm", "evaluation")} | {
        "privacy": fields["privacy"] | {"noise": "normal"}
    }
