"""What an attack's hits prove, with confidence: lower bounds on the privacy that a mechanism really gives.

The canary attack (Gaussian differential privacy, Dong, Roth and Su 2022; Nasr et al. 2023, arXiv:2302.07956): whoever
tells with or without a patient apart with the rates FPR and FNR proves mu >= Phi^-1(1 - FPR) - Phi^-1(FNR).

The one-run audit (Steinke, Nasr, Jagielski 2023, arXiv:2305.08846): of m canaries, each in by a fair coin, r are
guessed and v guesses are right. Under (epsilon, delta) the probability of so many is at most

    p(epsilon) = P[W >= v] + 2 m delta max_i (P[W >= v - i] - P[W >= v]) / i,   W ~ Binomial(r, e^eps / (1 + e^eps))
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import bdtrc, betaincinv, expit, gammaln, ndtri, xlog1py, xlogy

_STEPS = 60  # of the bisection: far below 1e-6


def rate_upper_bound(errors: int, trials: int, *, doubt: float) -> float:
    """The Clopper-Pearson bound: the true rate of errors lies above it with probability `doubt` at most."""
    return 1.0 if errors >= trials else float(betaincinv(errors + 1, trials - errors, 1 - doubt))


def mu_lower_bound(*, false_alarms: int, absent: int, misses: int, present: int, doubt: float) -> float:
    """mu that was shown, at least 0; it is above the true one with probability 2 `doubt` at most."""
    fpr = rate_upper_bound(false_alarms, absent, doubt=doubt)
    fnr = rate_upper_bound(misses, present, doubt=doubt)
    shown = float(ndtri(1 - fpr) - ndtri(fnr))
    return max(0.0, shown) if math.isfinite(shown) else 0.0


def p_value(*, epsilon: float, delta: float, canaries: int, guesses: int, right: int) -> float:
    """The probability of `right` guesses or more, at most, if (epsilon, delta) held; see above."""
    if right < 1:
        return 1.0
    chance = float(expit(epsilon))
    fewer = np.arange(right - 1, -1, -1)  # v - 1, v - 2, ..., 0
    logarithms = (
        gammaln(guesses + 1)
        - gammaln(fewer + 1)
        - gammaln(guesses - fewer + 1)
        + xlogy(fewer, chance)
        + xlog1py(guesses - fewer, -chance)
    )
    slack = float(np.max(np.cumsum(np.exp(logarithms)) / np.arange(1, right + 1)))
    return min(1.0, float(bdtrc(right - 1, guesses, chance)) + 2 * canaries * delta * slack)


def epsilon_lower_bound(*, delta: float, canaries: int, guesses: int, right: int, doubt: float) -> float:
    """The largest epsilon with p(epsilon) <= `doubt`; 0 if there is none."""

    def refuted(epsilon: float) -> bool:
        found = p_value(epsilon=epsilon, delta=delta, canaries=canaries, guesses=guesses, right=right)
        return found <= doubt

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low
