"""The ledger's accountant against others: Opacus' RDP and PRV over a grid, dp-accounting's REPLACE_ONE and mixtures of
Gaussians for what an episode query really is, and the table of the documentation."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from dp_accounting import DpEvent, GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld.privacy_loss_distribution import from_mixture_gaussian_mechanism

from common.accounting import Event, epsilon, epsilon_rdp
from deploy.benchmarks.epsilon_table import lines

PRV_ERROR = 0.01  # Opacus' default for epsilon
GRID = [  # q, z, queries, delta
    (0.01, 1.0, 1000, 1e-5),
    (0.1, 0.8, 24, 1e-3),
    (0.1, 1.0, 500, 2e-4),
    (0.1, 4.0, 500, 1e-5),
    (0.2, 8.0, 60, 1e-5),
    (0.3, 1.5, 40, 1e-3),
    (0.5, 2.0, 30, 1e-4),
    (1.0, 1.0, 1, 1e-3),
    (1.0, 4.0, 10, 1e-5),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("rate", "noise", "count", "delta"), GRID, ids=lambda value: f"{value:g}")
def test_opacus_agrees(rate: float, noise: float, count: int, delta: float) -> None:
    """PRV (Gopi 2021) returns an upper bound that is PRV_ERROR above its estimate. PLD's buckets are 1e-3 wide, so both
    should agree to two of them. RDP is looser in every case, and Opacus' and ours differ in their orders only."""
    from opacus.accountants import PRVAccountant, RDPAccountant

    prv, rdp = PRVAccountant(), RDPAccountant()
    for other in (prv, rdp):
        other.history = [(noise, rate, count)]
    query = [Event(rate, noise, count)]
    by_pld, by_rdp = epsilon(query, delta), rdp.get_epsilon(delta)
    assert by_pld == pytest.approx(prv.get_epsilon(delta) - PRV_ERROR, abs=2e-3)
    assert by_pld <= min(by_rdp, epsilon_rdp(query, delta))
    assert epsilon_rdp(query, delta) == pytest.approx(by_rdp, rel=0.005)


def composed(query: DpEvent, count: int, relation: NeighboringRelation, delta: float) -> float:
    accountant = PLDAccountant(relation)
    accountant.compose(query, count)
    return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize(("rate", "noise", "count"), [(1.0, 2.0, 5), (0.5, 1.0, 5), (0.2, 2.0, 20)])
def test_an_episode_query_is_charged_what_a_replaced_gradient_costs_or_more(
    rate: float, noise: float, count: int
) -> None:
    """In units of C the noise is 2 z, and a patient replaces an episode's clipped gradient by another. Where the
    patient surely joins that is REPLACE_ONE; under sampling REPLACE_ONE lets the episode move by C on either side of
    nothing, and costs less than what is charged: staying against moving by 2 C."""
    gaussian = GaussianDpEvent(2 * noise)
    query = gaussian if rate == 1 else PoissonSampledDpEvent(rate, gaussian)
    replaced = composed(query, count, NeighboringRelation.REPLACE_ONE, 1e-4)
    charged = epsilon([Event(rate, noise, count)], 1e-4)
    assert replaced <= charged + 1e-4
    if rate == 1:
        assert replaced == pytest.approx(charged, abs=1e-4)


def of_episodes(rate: float, moves: list[float], std: float, eps: float) -> float:
    """delta at `eps`: a patient joins with probability `rate` and moves one of the episodes, all in one direction."""
    share = rate / len(moves)
    found = from_mixture_gaussian_mechanism(
        std, [0.0, *moves], [1 - rate, *[share] * len(moves)], value_discretization_interval=0.01
    )
    return float(found.get_delta_for_epsilon(eps))


def test_a_mixture_over_episodes_loses_at_most_the_charge_and_reaches_it() -> None:
    """By dp-accounting's bound for mixtures, in buckets of 0.01: finer ones take minutes and agree to 1e-5."""
    rate, noise, eps = 0.5, 2.0, 0.3
    accountant = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL)
    accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)))
    charged = accountant.get_delta(eps)
    assert of_episodes(rate, [2.0, 2.0], 2 * noise, eps) == pytest.approx(charged, abs=1e-4)
    assert of_episodes(rate, [0.5, 1.0, 2.0], 2 * noise, eps) < 0.5 * charged
    assert of_episodes(rate, [2.0, 2.0], noise, eps) > 2 * charged  # noise for C


DIRECTIONS = {
    "one": [(2.0, 0.0)],
    "opposite": [(2.0, 0.0), (-2.0, 0.0)],
    "right-angles": [(2.0, 0.0), (0.0, 2.0)],
    "all-round": [(2 * math.cos(a), 2 * math.sin(a)) for a in (0.0, 2.1, 4.2)],
    "some-shorter": [(2.0, 0.0), (0.3, 0.4), (-1.0, 1.0)],
}


def hockey_sticks(rate: float, moves: list[tuple[float, float]], std: float, eps: float) -> list[float]:
    """delta at `eps` of Normal(0) against the mixture, and the other way round, on a grid in the plane."""
    axis = np.linspace(-8 * std, 8 * std + 2, 200)
    x, y = np.meshgrid(axis, axis)

    def density(place: tuple[float, float]) -> np.ndarray:
        squares = (x - place[0]) ** 2 + (y - place[1]) ** 2
        values: np.ndarray = np.exp(-squares / (2 * std**2)) / (2 * np.pi * std**2)
        return values

    still = density((0.0, 0.0))
    moved = (1 - rate) * still + rate / len(moves) * sum(density(place) for place in moves)
    area = (axis[1] - axis[0]) ** 2
    pairs = ((still, moved), (moved, still))
    return [float((np.maximum(p - math.exp(eps) * q, 0.0)).sum() * area) for p, q in pairs]


@pytest.mark.parametrize("eps", [0.1, 1.0])
@pytest.mark.parametrize("directions", DIRECTIONS)
def test_whatever_the_directions_of_the_episodes_the_charge_dominates(directions: str, eps: float) -> None:
    """No library: the densities themselves. The charge is one direction, for all m episodes alike."""
    rate, noise = 0.4, 0.8
    charged = hockey_sticks(rate, DIRECTIONS["one"], 2 * noise, eps)
    found = hockey_sticks(rate, DIRECTIONS[directions], 2 * noise, eps)
    assert all(a <= b + 1e-9 for a, b in zip(found, charged, strict=True))
    assert max(hockey_sticks(rate, DIRECTIONS["one"], noise, eps)) > 1.5 * max(charged)  # noise for C


def test_the_densities_give_what_the_accountant_says() -> None:
    rate, noise, eps = 0.4, 0.8, 0.5
    accountant = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL)
    accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)))
    assert max(hockey_sticks(rate, DIRECTIONS["one"], 2 * noise, eps)) == pytest.approx(
        accountant.get_delta(eps), abs=2e-4
    )


@pytest.mark.slow
def test_the_table_of_the_documentation_is_what_the_script_prints() -> None:
    page = Path(__file__).parents[1] / "deploy" / "privacy-costs.md"
    assert page.read_text().splitlines() == list(lines())
