"""What a study costs a patient: epsilon of a list of private queries, and the noise that a budget needs.

Every private query is one Poisson-subsampled Gaussian at patient level: each patient joins with probability q, and
the noise's std is z times the sensitivity. PLD (Koskela 2020, Doroshenko 2022) is the reference and RDP (Mironov 2019,
arXiv:1908.10530) the cross-check; both are upper bounds. Adjacency is zero-out with a public N: a patient's records
contribute nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any

from common.errors import PlanError, Problem
from common.plan import PrivacySpec, StudyPlan
from common.timing import timed

_DISCRETISATION = 1e-3  # of the privacy loss
_HOPELESS = 100.0  # an RDP epsilon above this is returned as it is: PLD takes minutes there, and nothing is promised
_RDP_ORDERS = (*(1 + x / 10 for x in range(10, 99)), *range(11, 64), 128, 256, 512, 1024)  # below 2 few converge
_QUICK_ORDERS = (2, 3, 4, 6, 8, 12, 16)  # integers, whose sums are exact and short; fewer orders, a looser bound
_HIGHEST_ORDER = 4096  # of a filter
_LEAST_NOISE, _MOST_NOISE = 100, 10_000_000  # thousandths: where a noise multiplier is looked for
_SECANTS = 12  # then halves: a dozen more are enough


@dataclass(frozen=True)
class Event:
    """`count` Poisson-subsampled Gaussian queries with one rate and one noise."""

    sample_rate: float  # q in (0, 1]
    noise_multiplier: float  # z > 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample_rate is {self.sample_rate}; it must lie in (0, 1]")
        if not self.noise_multiplier > 0:
            raise ValueError(f"noise_multiplier is {self.noise_multiplier}; it must be above 0")
        if self.count < 0:
            raise ValueError(f"count is {self.count}; it must not be negative")


@dataclass(frozen=True)
class PrivacyCost:
    """What a whole study costs each patient of one site."""

    site: str
    patients: int  # N, declared and public
    delta: float
    sample_rate: float  # q
    noise_multiplier: float  # z; inf if nothing is asked
    queries: int  # over all rounds
    epsilon: float  # by PLD
    epsilon_rdp: float  # by RDP, the looser cross-check

    @property
    def expected_batch(self) -> float:
        """B = q * N, the public constant by which every private sum is divided."""
        return self.sample_rate * self.patients


def epsilon(events: Iterable[Event], delta: float) -> float:
    """Epsilon at `delta` of all events together, by PLD. No query costs 0."""
    return _epsilon(_grouped(events), _checked(delta))


def epsilon_rdp(events: Iterable[Event], delta: float) -> float:
    """The same by RDP."""
    return _epsilon_rdp(_grouped(events), _checked(delta))


def epsilon_adaptive(events: Iterable[Event], delta: float, *, order: int) -> float:
    """Epsilon at `delta` of events whose parameters may depend on the releases before them.

    A Renyi filter (Feldman, Zrnic 2021, arXiv:2008.11193): if the Renyi divergences of one `order`, fixed before the
    first event, never sum to more than a bound, all events together are Renyi private to that bound, however each was
    chosen. PLD has no such theorem for sampled Gaussians. Epsilon is that of the sum (Canonne, Kamath, Steinke 2020).
    """
    return _epsilon_rdp(_grouped(events), _checked(delta), (order,))


@lru_cache
def filter_order(*, epsilon: float, delta: float) -> int:
    """The order of a filter: the integer at which a budget bears the most Gaussian queries.

    A Gaussian query's divergence grows with its order, a * r, and so does a sampled one's where it is private enough to
    be of use. A budget bears R(a) = (epsilon - log(1 - 1/a) + log(delta * a) / (a - 1)) / a of r: whatever q, z and the
    number of queries, R has one maximum. An integer, for only those have an exact sum (Mironov 2019).

    Raises ValueError if the budget bears nothing at any order.
    """
    budget = epsilon

    def borne(order: int) -> float:
        return (budget - math.log1p(-1 / order) + math.log(delta * order) / (order - 1)) / order

    best = max(range(2, _HIGHEST_ORDER), key=borne)
    if not borne(best) > 0:
        raise ValueError(f"a filter bears nothing within epsilon {epsilon:g} at delta {delta:.3g}: raise one of them")
    return best


@lru_cache(maxsize=1024)
def noise_multiplier_for(*, epsilon: float, delta: float, sample_rate: float, count: int) -> float:
    """The smallest z, in steps of 0.001, at which `count` queries cost at most `epsilon`; inf for no query.

    Looked for on `epsilon` itself, so that what is solved for is what is charged: by secants through log z and log
    epsilon, within what is known to be too little and enough, from where many queries together are one Gaussian.

    Raises ValueError if no z up to about 10 000 is enough.
    """
    if count == 0:
        return math.inf
    too_little, enough = _LEAST_NOISE, _MOST_NOISE + 1
    at = _many_queries(epsilon, _checked(delta), sample_rate, count)
    elasticity, before = 1.0, (0.0, 0.0)
    for attempt in range(_MOST_NOISE):
        at = min(max(at, too_little + 1), enough - 1)
        cost = _epsilon(((sample_rate, at / 1000, count),), delta)
        too_little, enough = (at, enough) if cost > epsilon else (too_little, at)
        if enough - too_little == 1:
            break
        here = math.log(at), math.log(max(cost, 1e-9))
        if attempt and here[0] != before[0]:
            elasticity = max(0.2, (before[1] - here[1]) / (here[0] - before[0]))
        before = here
        secant = math.exp(min(here[0] + (here[1] - math.log(epsilon)) / elasticity, 20.0))
        at = round(secant) if attempt < _SECANTS else (too_little + enough) // 2
    if enough > _MOST_NOISE:
        raise ValueError(
            f"epsilon {epsilon:g} at delta {delta:.3g} cannot be reached by {count} queries at sample rate"
            f" {sample_rate:g}: even a noise multiplier of {_MOST_NOISE / 1000:,.0f} costs more"
        )
    return enough / 1000


def _many_queries(epsilon: float, delta: float, sample_rate: float, count: int) -> int:
    """Thousandths of the z at which sampled queries, were they many, cost `epsilon`: together they then are one
    Gaussian query with mu = q sqrt(count (exp(1/z^2) - 1)) (Bu, Dong, Long, Su 2020, arXiv:1911.11607)."""
    low, high = 1e-6, 1e3  # of mu
    for _ in range(60):
        mu = math.sqrt(low * high)
        low, high = (low, mu) if _delta_of_gaussian(epsilon, mu) > delta else (mu, high)
    return round(1000 / math.sqrt(math.log1p((low / sample_rate) ** 2 / count)))


def _delta_of_gaussian(epsilon: float, mu: float) -> float:
    """Of one Gaussian query whose noise's std is 1/`mu` of its sensitivity (Balle, Wang 2018, theorem 8)."""
    normal = NormalDist()
    tail = normal.cdf(-epsilon / mu - mu / 2)
    return normal.cdf(-epsilon / mu + mu / 2) - (math.exp(epsilon + math.log(tail)) if tail else 0.0)


def queries_per_round(plan: StudyPlan) -> int:
    """Private queries that each training site answers in one round: the algorithm's, and one for the monitor."""
    from common.algorithms import ALGORITHMS

    queries = ALGORITHMS[plan.algorithm.name].queries_per_round(plan.algorithm)
    return queries + int(plan.monitored and queries > 0)


@timed("accounting")
def plan_cost(plan: StudyPlan, site: str) -> PrivacyCost | None:
    """What the whole study costs a patient of `site`; None for a plan without privacy.

    Raises PlanError if the plan's epsilon cannot be reached, or its own noise multiplier costs more.
    """
    if plan.privacy is None:
        return None
    privacy, patients = plan.privacy, plan.sites[site].patients
    delta, rate = delta_of(privacy, patients), plan.sampling.sample_rate
    queries = plan.rounds * queries_per_round(plan)
    noise = _noise(privacy, site, delta=delta, rate=rate, queries=queries)
    events = [Event(rate, noise, queries)] if queries else []
    cost = PrivacyCost(
        site=site,
        patients=patients,
        delta=delta,
        sample_rate=rate,
        noise_multiplier=noise,
        queries=queries,
        epsilon=epsilon(events, delta),
        epsilon_rdp=epsilon_rdp(events, delta),
    )
    if cost.epsilon > privacy.epsilon:
        needed = noise_multiplier_for(epsilon=privacy.epsilon, delta=delta, sample_rate=rate, count=queries)
        raise PlanError(
            Problem(
                f"site {site}",
                f"privacy.noise_multiplier {noise:g} costs epsilon {cost.epsilon:.2f} over {queries} queries, above"
                f" privacy.epsilon {privacy.epsilon:g}",
                f"use {needed:g} or more, or leave noise_multiplier out: it is then solved for",
            )
        )
    return cost


def delta_of(privacy: PrivacySpec, patients: int) -> float:
    """The plan's delta, or 1/(10 N)."""
    return 1 / (10 * patients) if privacy.delta is None else privacy.delta


def _noise(privacy: PrivacySpec, site: str, *, delta: float, rate: float, queries: int) -> float:
    if queries == 0:
        return math.inf
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    try:
        return noise_multiplier_for(epsilon=privacy.epsilon, delta=delta, sample_rate=rate, count=queries)
    except ValueError as error:
        remedy = "raise privacy.epsilon, or ask fewer queries (rounds, algorithm.inner_steps)"
        raise PlanError(Problem(f"site {site}", f"privacy.{error}", remedy)) from None


Group = tuple[float, float, int]  # q, z, count


def _grouped(events: Iterable[Event]) -> tuple[Group, ...]:
    counts: Counter[tuple[float, float]] = Counter()
    for event in events:
        if event.count and math.isfinite(event.noise_multiplier):
            counts[event.sample_rate, event.noise_multiplier] += event.count
    return tuple(sorted((q, z, count) for (q, z), count in counts.items()))


def _checked(delta: float) -> float:
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta}; it must lie between 0 and 1")
    return delta


@lru_cache(maxsize=4096)
def _epsilon(groups: tuple[Group, ...], delta: float) -> float:
    if not groups:
        return 0.0
    if _epsilon_rdp(groups, delta, _QUICK_ORDERS) > _HOPELESS:  # the bound of all orders is no higher
        bound = _epsilon_rdp(groups, delta)
        if bound > _HOPELESS:
            return bound
    return _epsilon_pld(groups, delta)


def _epsilon_pld(groups: tuple[Group, ...], delta: float) -> float:
    from dp_accounting.pld import privacy_loss_distribution

    total = privacy_loss_distribution.identity(value_discretization_interval=_DISCRETISATION)
    for group in groups:
        total = total.compose(_pld_of(*group))
    return float(total.get_epsilon_for_delta(delta))


@lru_cache(maxsize=32)
def _pld_of(q: float, z: float, count: int) -> Any:
    """Of `count` queries. What a ledger held before this round is not composed again."""
    return _pld_of_one(q, z).self_compose(count)


@lru_cache(maxsize=32)
def _pld_of_one(q: float, z: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        z, value_discretization_interval=_DISCRETISATION, sampling_prob=q, neighboring_relation=_zero_out()
    )


@lru_cache(maxsize=4096)
def _epsilon_rdp(groups: tuple[Group, ...], delta: float, orders: tuple[float, ...] = _RDP_ORDERS) -> float:
    from dp_accounting.rdp import RdpAccountant

    if not groups:
        return 0.0
    accountant = RdpAccountant(orders, _zero_out())
    for q, z, count in groups:
        accountant.compose(_dp_event(q, z, count))
    return float(accountant.get_epsilon(delta))


def _zero_out() -> Any:
    from dp_accounting import NeighboringRelation

    return NeighboringRelation.REPLACE_SPECIAL


def _dp_event(q: float, z: float, count: int) -> Any:
    import dp_accounting

    query = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(z))
    return dp_accounting.SelfComposedDpEvent(query, count)
