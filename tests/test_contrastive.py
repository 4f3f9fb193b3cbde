"""Supervised contrastive learning against the equation written out term by term."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.contrastive import supervised_contrastive

Loss = Callable[[Tensor, Tensor, float], Tensor]


def vectors_of(count: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, 5, generator=rng, dtype=torch.float64), dim=1)


def written_out(vectors: Tensor, groups: Tensor, temperature: float) -> float:
    """Eq. 2 of the paper, its outer sum as a mean over those that have positives."""
    n = len(vectors)
    close = [[math.exp(float(vectors[i] @ vectors[j]) / temperature) for j in range(n)] for i in range(n)]
    terms = []
    for i in range(n):
        positives = [p for p in range(n) if p != i and groups[p] == groups[i]]
        below = sum(close[i][a] for a in range(n) if a != i)
        if positives:
            terms.append(-sum(math.log(close[i][p] / below) for p in positives) / len(positives))
    return sum(terms) / len(terms)


def agrees(loss: Loss) -> bool:
    groups = torch.tensor([0, 1, 0, 2, 1, 0, 3])
    found = float(loss(vectors_of(7, 0), groups, 0.3))
    return math.isclose(found, written_out(vectors_of(7, 0), groups, 0.3), rel_tol=1e-9)


def itself_in_the_denominator(vectors: Tensor, groups: Tensor, temperature: float) -> Tensor:
    closeness = vectors @ vectors.T / temperature
    alike = (groups[:, None] == groups[None]) & ~torch.eye(len(groups), dtype=torch.bool)
    logs = closeness - closeness.logsumexp(dim=1, keepdim=True)
    some = alike.any(dim=1)
    return -((logs * alike).sum(dim=1)[some] / alike.sum(dim=1)[some]).mean()


def mean_inside_the_logarithm(vectors: Tensor, groups: Tensor, temperature: float) -> Tensor:
    """L_in, eq. 3 of the paper: another loss."""
    itself = torch.eye(len(groups), dtype=torch.bool)
    alike = (groups[:, None] == groups[None]) & ~itself
    shares = (vectors @ vectors.T / temperature).masked_fill(itself, float("-inf")).softmax(dim=1)
    some = alike.any(dim=1)
    return -((shares * alike).sum(dim=1)[some] / alike.sum(dim=1)[some]).log().mean()


def test_it_is_the_paper_s_equation_and_two_near_misses_are_not() -> None:
    assert agrees(supervised_contrastive)
    assert not agrees(itself_in_the_denominator)
    assert not agrees(mean_inside_the_logarithm)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=5, max_size=12), st.integers(0, 99), st.floats(0.1, 2.0))
def test_any_groups(groups: list[int], seed: int, temperature: float) -> None:
    vectors = vectors_of(len(groups), seed)
    found = supervised_contrastive(vectors, torch.tensor(groups), temperature)
    assert float(found) == pytest.approx(written_out(vectors, torch.tensor(groups), temperature), rel=1e-9)


def test_two_tight_opposite_pairs() -> None:
    """Each sees its twin at 1 and the two others at -1: log(1 + 2 exp(-2 / t))."""
    line = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    found = supervised_contrastive(line, torch.tensor([0, 0, 1, 1]), 0.5)
    assert float(found) == pytest.approx(math.log1p(2 * math.exp(-4)), rel=1e-5)


def test_vectors_without_a_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="no two of 3 vectors are of one group"):
        supervised_contrastive(vectors_of(3, 0), torch.arange(3))
