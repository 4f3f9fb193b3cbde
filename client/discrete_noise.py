"""Noise without floating point: the discrete Gaussian of Canonne, Kamath and Steinke (2020, arXiv:2004.00010), sampled
exactly from the operating system's generator, on a lattice whose step is a power of two.

    p(n) proportional to exp(-n^2 / (2 s^2)),  n an integer;  the noise is g n with g = 2^j and 2^34 <= s <= 2^35

A normal number as computers draw it is none: its low bits depend on what it is added to (Mironov 2012). Here every
patient's clipped contribution is rounded to a multiple of g before it is added, and sums and noise are multiples of g
below 2^53 g (as long as fewer than 2^18 z patients join): exact in float64, in any order.

Sensitivity. Rounding d numbers moves a vector by g sqrt(d) / 2 at most. So contributions are clipped to the radius less
that, and are within the radius once they are rounded: the sensitivity is what it was, and z is not changed. The clip
gets smaller by less than z sqrt(d) 2^-35 of itself: 3e-7 for z = 10 and a million numbers.

Charge. That of the normal with std z times the sensitivity (s is rounded up):
* n' = round(Normal(0, s^2)) added to integers is the rounded sum of the normal's mechanism: post-processing, whatever
  is subsampled, composed and accounted. n and n' differ in total variation by 0.0202 / s^2, here below 7e-23. So over
  k numbers delta grows by (1 + e^epsilon) 7e-23 k: by 2e-10 for a million numbers, a thousand queries and epsilon 8.
* Renyi orders are the normal's at most: D_a <= a |v|^2 / (2 s^2) for a shift by the integers v (their Theorem 4), and a
  subsampled moment of integer order is a sum of such terms with positive weights, as it is for the normal.

Cost: about 1.2 s of one core for a million numbers, 180 times the normal's, and some 50 MB of the system's entropy.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_FINE = 34  # s >= 2^34
_MARGIN = 1e-9  # relative: float64 scales a vector to its bound only nearly

Integers = np.ndarray  # int64 (n,)
Coins = np.ndarray  # bool (n,)


@dataclass(frozen=True)
class Lattice:
    """Where a query's contributions and its noise lie; `std` of the noise is z times the query's sensitivity."""

    std: float

    @property
    def step(self) -> float:
        """g, a power of two."""
        return 2.0 ** (math.frexp(self.std)[1] - 1 - _FINE)

    @property
    def deviation(self) -> int:
        """s: the noise's std in steps, rounded up."""
        return math.ceil(self.std / self.step)

    def bound(self, radius: float, numbers: int) -> float:
        """To what `numbers` numbers are cut so that they are within `radius` once they are rounded.

        Raises ValueError if rounding could move them by half of it: then the lattice is too coarse for them.
        """
        slack = self.step * math.sqrt(numbers) / 2
        if slack > radius / 2:
            raise ValueError(f"a lattice of step {self.step:.3g} is too coarse for {numbers} numbers within {radius:g}")
        return (radius - slack) * (1 - _MARGIN)

    def rounded(self, values: Tensor) -> Tensor:
        """float64: the nearest multiples of the step."""
        return torch.round(values.double() / self.step) * self.step

    def sample(self, shape: Sequence[int]) -> Tensor:
        """float64 noise of this shape, multiples of the step."""
        numbers = discrete_gaussian(self.deviation, math.prod(shape))
        return torch.from_numpy(numbers.astype(np.float64)).reshape(tuple(shape)) * self.step


def discrete_gaussian(deviation: int, count: int) -> Integers:
    """int64 (count,): independent, p(n) proportional to exp(-n^2 / (2 deviation^2)). Exact; no floating point.

    Raises ValueError for a deviation outside 1 .. 2^40.
    """
    if not 1 <= deviation <= 2**40:
        raise ValueError(f"deviation is {deviation}; it must lie in 1 .. 2^40")
    found = np.empty(0, dtype=np.int64)
    while len(found) < count:
        tried = _discrete_laplace(deviation, int(1.4 * (count - len(found))) + 16)
        found = np.concatenate([found, tried[_exp_minus_half_square(np.abs(np.abs(tried) - deviation), deviation)]])
    return found[:count]


def _discrete_laplace(scale: int, tries: int) -> Integers:
    """p(n) proportional to exp(-|n| / scale); about 0.6 of `tries` (Algorithm 2)."""
    low = _below(scale, tries)
    low = low[_exp_minus(low, scale)]
    high, more = np.zeros_like(low), np.arange(len(low))
    while len(more):
        more = more[_exp_minus(np.ones(len(more), dtype=np.int64), 1)]
        high[more] += 1
    size, negative = low + scale * high, _below(2, len(low)) == 1
    kept: Integers = np.where(negative, -size, size)[~(negative & (size == 0))]
    return kept


def _exp_minus_half_square(n: Integers, s: int) -> Coins:
    """Bernoulli(exp(-n^2 / (2 s^2))): of n = a s + f as exp(-1/2)^(a^2) exp(-f/s)^a exp(-f^2/(2 s^2))."""
    a, f = n // s, n % s

    def half_square(index: Integers, k: int) -> Coins:
        twice = (_below(s, len(index)) < f[index]) & (_below(s, len(index)) < f[index])
        both: Coins = twice & (_below(2 * k, len(index)) == 0)
        return both

    holds = _alternating(half_square, len(n))
    for times, numerator, denominator in ((a, f, s), (a * a, np.ones_like(n), 2)):
        left, toss = np.where(holds, times, 0), 0
        while len(index := np.flatnonzero(left > toss)):
            holds[index] &= _exp_minus(numerator[index], denominator)
            left[~holds] = 0
            toss += 1
    return holds


def _exp_minus(n: Integers, m: int) -> Coins:
    """Bernoulli(exp(-n / m)) for each n in 0 .. m."""
    return _alternating(lambda index, k: (_below(m, len(index)) < n[index]) & (_below(k, len(index)) == 0), len(n))


def _alternating(coin: Callable[[Integers, int], Coins], count: int) -> Coins:
    """Bernoulli(exp(-x)), x in [0, 1], from coins of chance x / k, k = 1, 2, ... (Algorithm 1): toss until one fails,
    and see whether that was an odd one."""
    odd, alive, k = np.zeros(count, dtype=bool), np.arange(count), 1
    while len(alive):
        goes_on = coin(alive, k)
        odd[alive[~goes_on]] = k % 2 == 1
        alive, k = alive[goes_on], k + 1
    return odd


def _below(bound: int, count: int) -> Integers:
    """Uniform integers in 0 .. bound - 1: words of the operating system's generator, those that are too large again."""
    if bound == 1:
        return np.zeros(count, dtype=np.int64)
    bits = (bound - 1).bit_length()
    word = next(size for size in (1, 2, 4, 8) if bits <= 8 * size)
    found = np.empty(0, dtype=np.int64)
    while len(found) < count:
        tries = (count - len(found)) * 2**bits // bound + 16
        words = np.frombuffer(os.urandom(word * tries), dtype=f"<u{word}").astype(np.int64) & (2**bits - 1)
        found = np.concatenate([found, words[words < bound]])
    return found[:count]
