"""The step self-test: the real code passes, every planted bug FAILs, and a site that FAILs takes part in nothing."""

from __future__ import annotations

import math
import subprocess
import sys
from fractions import Fraction
from math import comb
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import client.selftest
from client.audit_bounds import epsilon_lower_bound, mu_lower_bound, p_value, rate_upper_bound
from client.doctor import examine
from client.private_data import PrivateDataset
from client.selftest import DOUBT, Check, attacked, balanced_coins, examined, require_self_test, run_self_test
from client.worker import Worker
from common.errors import SelfTestFailed
from tests.conftest import SiteMaker, join_lab
from tests.planted import OF_A_QUERY

ROOT = Path(__file__).parents[1]


def the(query: str) -> Check:
    return next(check for check in run_self_test() if check.query == query)


def test_the_real_code_passes_and_the_attack_sees_nearly_all_that_is_claimed() -> None:
    checks = list(run_self_test())
    assert [check.query for check in checks] == ["gradient", "class_sums", "statistic"]
    for check in checks:
        assert check.verdict == "PASS", check.line()
        assert check.claimed / 2 < check.shown < 1.3 * check.claimed
        assert check.certain < check.shown
        assert check.noise == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("bug", OF_A_QUERY)
def test_a_planted_bug_fails(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, plant = OF_A_QUERY[bug]
    plant(monkeypatch)
    found = the(query)
    assert found.verdict == "FAIL", found.line()


def test_a_query_that_breaks_off_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrivateDataset, "gradient", lambda *_: 1 / 0)
    assert the("gradient").line() == (
        "FAIL         gradient: the query broke off (ZeroDivisionError: division by zero)"
    )


# ---- the verdict itself, on ideal releases -----------------------------------------------------------------------


def ideal(signal: float = 1.0, noise: float = 0.5, *, releases: int = 56, canaries: int = 32) -> Check:
    """What a mechanism of this signal and noise gets, declared as 1 and 1/2."""
    coins, directions = balanced_coins(releases, canaries), torch.eye(canaries, 100, dtype=torch.float64)
    drawn = torch.randn(releases, 100, dtype=torch.float64) * noise + signal * coins.double() @ directions
    return examined("ideal", lambda: (drawn, coins), directions, torch.zeros(100, dtype=torch.float64))


def test_the_declared_mechanism_passes_again_and_again() -> None:
    """Of 300 self-tests none FAILs: by the bounds one in thirty million would."""
    assert {ideal().verdict for _ in range(300)} == {"PASS"}


@pytest.mark.parametrize(
    ("signal", "noise", "verdict"),
    [(2.0, 0.5, "FAIL"), (1.0, 0.25, "FAIL"), (1.0, 0.65, "FAIL"), (1.0, 1e-9, "FAIL"), (0.0, 0.5, "FAIL")],
)
def test_what_is_not_the_declared_mechanism_fails(signal: float, noise: float, verdict: str) -> None:
    assert ideal(signal, noise).verdict == verdict


def test_too_few_trials_are_inconclusive() -> None:
    assert ideal(releases=8, canaries=2).verdict == "INCONCLUSIVE"


def test_noise_that_comes_again_is_caught_even_where_its_size_is_right() -> None:
    coins, directions = balanced_coins(56, 32), torch.eye(32, 400, dtype=torch.float64)
    again = torch.randn(28, 400, dtype=torch.float64).repeat_interleave(2, dim=0) * 0.5
    found = examined("ideal", lambda: (again + coins.double() @ directions, coins), directions, torch.zeros(400))
    assert found.verdict == "FAIL"


def test_coins_are_fair_in_each_half() -> None:
    coins = balanced_coins(56, 32)
    assert torch.equal(coins[::2], coins[1::2])
    assert coins[:28].sum(0).tolist() == coins[28:].sum(0).tolist() == [14] * 32
    assert not torch.equal(coins, balanced_coins(56, 32))


def test_noise_that_is_fixed_along_each_direction_is_no_noise() -> None:
    """Each canary has a threshold of its own: one for all would take fixed noise for noise."""
    coins, fixed = balanced_coins(56, 32), torch.randn(32, dtype=torch.float64)
    assert attacked(fixed + coins.double(), coins) == {"false_alarms": 0, "absent": 448, "misses": 0, "present": 448}


# ---- bounds, against another way to compute them -----------------------------------------------------------------


def tail(least: int, trials: int, chance: Fraction) -> Fraction:
    """P[Binomial >= least], exactly."""
    return sum(
        (comb(trials, k) * chance**k * (1 - chance) ** (trials - k) for k in range(max(0, least), trials + 1)),
        Fraction(0),
    )


@pytest.mark.parametrize(("errors", "trials"), [(0, 1), (0, 40), (3, 40), (25, 60), (59, 60), (60, 60)])
@pytest.mark.parametrize("doubt", [0.05, DOUBT])
def test_clopper_pearson_is_the_rate_at_which_so_few_errors_are_that_rare(
    errors: int, trials: int, doubt: float
) -> None:
    low, high = Fraction(0), Fraction(1)
    for _ in range(40):
        middle = (low + high) / 2
        rare = 1 - tail(errors + 1, trials, middle.limit_denominator(10**12)) <= Fraction(doubt)
        low, high = (low, middle) if rare else (middle, high)
    found = rate_upper_bound(errors, trials, doubt=doubt)
    assert found == pytest.approx(1.0 if errors == trials else float(high), abs=1e-6)
    if errors < trials:
        assert found == pytest.approx(stats.binomtest(errors, trials).proportion_ci(1 - 2 * doubt).high, abs=1e-6)


def test_mu_is_the_difference_of_two_quantiles() -> None:
    found = mu_lower_bound(false_alarms=20, absent=400, misses=31, present=420, doubt=0.01)
    quantile = NormalDist().inv_cdf
    fpr, fnr = (stats.beta.ppf(0.99, k + 1, n - k) for k, n in ((20, 400), (31, 420)))
    assert found == pytest.approx(quantile(1 - fpr) - quantile(fnr), abs=1e-6)
    assert mu_lower_bound(false_alarms=5, absent=5, misses=0, present=5, doubt=0.01) == 0.0


def exact_p(epsilon: float, delta: float, m: int, r: int, v: int) -> float:
    """The paper's formula in rational numbers, and over every i up to m."""
    odds = Fraction(math.exp(epsilon))
    chance = odds / (1 + odds)
    tails = [tail(k, r, chance.limit_denominator(10**9)) for k in range(v + 1)]
    slack = max((((tails[v - i] if i <= v else 1) - tails[v]) / i for i in range(1, m + 1)), default=Fraction(0))
    return min(1.0, float(tails[v] + 2 * m * Fraction(delta) * slack))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(0, 40), st.floats(0, 5), st.sampled_from([0.0, 1e-6, 1e-3]), st.data())
def test_the_one_run_p_value_is_that_of_the_paper(
    r: int, more: int, epsilon: float, delta: float, data: st.DataObject
) -> None:
    v = data.draw(st.integers(0, r))
    found = p_value(epsilon=epsilon, delta=delta, canaries=r + more, guesses=r, right=v)
    assert found == pytest.approx(exact_p(epsilon, delta, r + more, r, v), abs=1e-6)


@pytest.mark.parametrize(("r", "v"), [(30, 28), (30, 30), (30, 24)])
@pytest.mark.parametrize("delta", [0.0, 1e-4])
def test_the_lower_bound_is_where_the_p_value_meets_the_doubt(r: int, v: int, delta: float) -> None:
    found = epsilon_lower_bound(delta=delta, canaries=80, guesses=r, right=v, doubt=0.05)
    low, high = 0.0, 10.0
    for _ in range(26):
        middle = (low + high) / 2
        low, high = (middle, high) if exact_p(middle, delta, 80, r, v) <= 0.05 else (low, middle)
    assert found > 0
    assert found == pytest.approx(low, abs=1e-6)


def test_known_bounds() -> None:
    """All of r right: p = chance^r; half of them right prove nothing."""
    all_right = epsilon_lower_bound(delta=0.0, canaries=200, guesses=100, right=100, doubt=0.05)
    chance = 0.05**0.01
    assert all_right == pytest.approx(math.log(chance / (1 - chance)), abs=1e-6)
    assert epsilon_lower_bound(delta=0.0, canaries=200, guesses=100, right=50, doubt=0.05) == 0.0
    assert epsilon_lower_bound(delta=0.5, canaries=200, guesses=100, right=100, doubt=0.05) == 0.0


# ---- what a FAIL does --------------------------------------------------------------------------------------------

FAILED = Check(
    query="gradient", verdict="FAIL", claimed=2.0, shown=4.0, certain=3.5, noise=0.0, why="a patient can be told"
)


def test_a_worker_does_not_start_where_the_self_test_failed(
    make_site: SiteMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.selftest, "self_test", lambda: (FAILED,))
    folder = make_site("alder")
    for simulated in (True, False):
        with pytest.raises(SelfTestFailed, match="takes part in nothing\nFAIL         gradient: a patient can be told"):
            Worker(folder, state=folder / "state", simulated=simulated)
    assert [file.name for file in (folder / "state").iterdir()] == ["selftest.failed"]


def test_a_fail_blocks_until_a_person_takes_it_away(make_site: SiteMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that shows now and then does not get through by starting again."""
    folder = make_site("alder")
    join_lab(folder, Ed25519PrivateKey.generate())
    for checks in ((FAILED,), ()):
        monkeypatch.setattr(client.selftest, "self_test", lambda checks=checks: checks)
        with pytest.raises(SelfTestFailed, match="a patient can be told"):
            Worker(folder, state=folder / "state")
        (finding,) = (finding for finding in examine(folder) if finding.check == "privacy self-test")
        assert finding.state == "wrong"
        assert "a patient can be told" in finding.what
        assert str(folder / "state" / "selftest.failed") in finding.remedy
    (folder / "state" / "selftest.failed").unlink()
    Worker(folder, state=folder / "state")


def test_doctor_runs_it_where_no_worker_did(make_site: SiteMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.selftest, "self_test", lambda: (FAILED,))
    (finding,) = (finding for finding in examine(make_site("alder")) if finding.check == "privacy self-test")
    assert (finding.state, finding.remedy) == ("wrong", "the worker will not start: install Consilium anew")


def test_an_inconclusive_one_blocks_nobody(make_site: SiteMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    dim = Check(query="gradient", verdict="INCONCLUSIVE", claimed=2.0, shown=0.5, certain=0.1, noise=1.0, why="dim")
    monkeypatch.setattr(client.selftest, "self_test", lambda: (dim,))
    folder = make_site("alder")
    join_lab(folder, Ed25519PrivateKey.generate())
    Worker(folder, state=folder / "state")
    (finding,) = (finding for finding in examine(folder) if finding.check == "privacy self-test")
    assert (finding.state, finding.what) == ("warning", "INCONCLUSIVE gradient: dim")


def test_it_runs_once_in_a_process(make_site: SiteMaker) -> None:
    assert require_self_test() is require_self_test()
    folder = make_site("alder")
    (finding,) = (finding for finding in examine(folder) if finding.check == "privacy self-test")
    assert finding.state == "ok"
    assert "gradient mu 1." in finding.what or "gradient mu 2." in finding.what


def test_a_worker_s_process_with_a_planted_bug_ends_with_exit_code_1(make_site: SiteMaker) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from tests.conftest import join_lab

    folder = make_site("alder")
    with (folder / "site.yaml").open("a") as config:
        config.write("verified_install: false\n")
    join_lab(folder, Ed25519PrivateKey.generate())
    code = (
        "import sys, torch, client.private_data; from client.cli import main\n"
        "client.private_data.os_generator = lambda: torch.Generator().manual_seed(7)\n"
        f"sys.argv = ['consilium-site', 'worker', {str(folder)!r}]; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1, done.stderr
    assert "the privacy self-test failed: this site takes part in nothing" in done.stderr
    assert "FAIL         gradient: " in done.stderr
    assert not (folder / "run" / "worker.sock").exists()
