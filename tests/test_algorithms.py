"""Algorithms against closed forms on L(w) = 0.5 ||w - y||^2, whose gradient is w - y: after k steps of rate a,
phi = y + (1-a)^k (w - y). The fake private queries below are exact, so nothing but the algorithm is tested."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.algorithms import ALGORITHMS
from common.params import Params
from common.plan import AlgorithmSpec

W, Y = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 0.5, -1.0])
HEAD, HEAD_Y = torch.tensor([0.0]), torch.tensor([2.0])


class Quadratic:
    """Exact gradients of the quadratic on the shared entry 'w' and the head; counts its queries."""

    def __init__(self) -> None:
        self.queries = 0

    def gradient(self, params: Params) -> Params:
        self.queries += 1
        return {name: value - {"w": Y, "head.weight": HEAD_Y}[name] for name, value in params.items()}


def run(name: str, **settings: float) -> tuple[torch.Tensor, torch.Tensor, int]:
    spec = AlgorithmSpec(name=name, **settings)  # type: ignore[arg-type]
    private = Quadratic()
    local = ALGORITHMS[name].local_update({"w": W}, {"head.weight": HEAD}, private, spec)
    assert local.update.keys() == {"w"}  # the head stays
    assert private.queries == ALGORITHMS[name].queries_per_round(spec)
    return local.update["w"], local.head["head.weight"], private.queries


steps, rates = st.integers(1, 8), st.floats(0.01, 0.9)


@pytest.mark.parametrize("name", ["reptile", "fedavg"])
@given(k=steps, a=rates)
def test_k_steps(name: str, k: int, a: float) -> None:
    update, head, queries = run(name, inner_steps=k, inner_lr=a)
    assert torch.allclose(update, (1 - (1 - a) ** k) * (Y - W), atol=1e-5)
    assert torch.allclose(head, HEAD_Y + (1 - a) ** k * (HEAD - HEAD_Y), atol=1e-5)
    assert queries == k


@given(k=steps, a=rates)
def test_fomaml_moves_by_the_gradient_at_the_adapted_parameters(k: int, a: float) -> None:
    update, _, queries = run("fomaml", inner_steps=k, inner_lr=a)
    assert torch.allclose(update, -a * (1 - a) ** k * (W - Y), atol=1e-5)
    assert queries == k + 1  # the query step is a private query too


@given(k=steps, a=st.floats(0.01, 0.4), mu=st.floats(0.01, 1.0))
def test_fedprox_pulls_to_the_shared_parameters(k: int, a: float, mu: float) -> None:
    """With the pull, phi - fixed point shrinks by 1 - a(1+mu); the fixed point is (y + mu w)/(1 + mu)."""
    update, head, _ = run("fedprox", inner_steps=k, inner_lr=a, proximal=mu)
    fixed = (Y + mu * W) / (1 + mu)
    assert torch.allclose(W + update, fixed + (1 - a * (1 + mu)) ** k * (W - fixed), atol=1e-5)
    assert torch.allclose(head, HEAD_Y + (1 - a) ** k * (HEAD - HEAD_Y), atol=1e-5)


def test_local_only_asks_nothing_and_moves_nothing() -> None:
    update, head, queries = run("local_only")
    assert queries == 0
    assert torch.equal(update, torch.zeros(3))
    assert torch.equal(head, HEAD)


def test_head_has_its_own_rate() -> None:
    update, head, _ = run("reptile", inner_steps=1, inner_lr=0.1, head_lr=0.5)
    assert torch.allclose(update, 0.1 * (Y - W))
    assert torch.allclose(head, 0.5 * HEAD_Y)


def test_learning_to_learn_starts_from_a_fresh_head_and_baselines_keep_theirs() -> None:
    assert {name for name, row in ALGORITHMS.items() if not row.keeps_head} == {"reptile", "fomaml"}
