"""The inner loop against its closed form on 0.5 ||w - y||^2: after k steps of rate a, w = y + (1-a)^k (w0 - y)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import jacrev

from common.inner_loop import adapt
from common.learner import gradient_at
from common.params import select
from common.plan import AdaptationSpec
from tests.exact_queries import conv_learner, images, point_learner, towards, written_out_loss

Y = torch.tensor([1.0, -2.0, 0.5])
W = torch.tensor([3.0, 0.0, -1.0])
steps, rates = st.integers(1, 8), st.floats(0.01, 0.9)
law = settings(max_examples=20, deadline=None)


@law
@given(k=steps, a=rates)
def test_k_steps(k: int, a: float) -> None:
    phi = adapt(point_learner(), {"body.w": W}, towards(Y), AdaptationSpec(steps=k, lr=a))
    assert torch.allclose(phi["body.w"], Y + (1 - a) ** k * (W - Y), atol=1e-5)


@law
@given(k=steps, a=st.floats(0.01, 0.4), pull=st.floats(0.01, 1.0))
def test_a_pull_draws_back_to_where_the_loop_began(k: int, a: float, pull: float) -> None:
    phi = adapt(point_learner(), {"body.w": W}, towards(Y), AdaptationSpec(steps=k, lr=a), pull=pull)
    fixed = (Y + pull * W) / (1 + pull)
    assert torch.allclose(phi["body.w"], fixed + (1 - a * (1 + pull)) ** k * (W - fixed), atol=1e-5)


@law
@given(k=steps)
def test_learned_rates_replace_the_plan_s_number_by_number(k: int) -> None:
    own = torch.tensor([0.0, 0.2, 0.5])
    phi = adapt(
        point_learner(), {"body.w": W}, towards(Y), AdaptationSpec(steps=k, lr=0.1), rates={"body.w": own, "other": W}
    )
    assert torch.allclose(phi["body.w"], Y + (1 - own) ** k * (W - Y), atol=1e-5)


@pytest.mark.parametrize("second_order", [False, True])
def test_the_derivative_of_the_result_is_the_jacobian_or_cut_off(second_order: bool) -> None:
    """d phi / d w0 = (1-a)^k I; a first-order result is a constant."""

    def end(w: torch.Tensor) -> torch.Tensor:
        spec = AdaptationSpec(steps=3, lr=0.2)
        return adapt(point_learner(), {"body.w": w}, towards(Y), spec, second_order=second_order)["body.w"]

    wanted = 0.8**3 * torch.eye(3) if second_order else torch.zeros(3, 3)
    assert torch.allclose(jacrev(end)(W), wanted, atol=1e-6)


@pytest.mark.parametrize("trainable", ["all", "film", "head"])
def test_a_network_moves_as_plain_autograd_says_and_nothing_else_of_it(trainable: str) -> None:
    """The head alone runs on features computed once, and must come to the same."""
    learner, params = conv_learner()
    support, spec = images(7, 0), AdaptationSpec.model_validate(
        {"trainable": trainable, "steps": 3, "lr": 0.2, "head_lr": 0.05}
    )  # fmt: skip
    got = adapt(learner, params, support, spec)
    by_hand = {name: value.clone() for name, value in params.items()}
    moving = {
        "all": list(params),
        "film": [n for n in params if n.startswith("head.") or n.split(".")[1] in ("2", "5", "8", "11")],
        "head": ["head.weight", "head.bias"],
    }[trainable]
    for _ in range(3):
        leaves = {name: by_hand[name].detach().requires_grad_() for name in moving}
        loss = written_out_loss(learner.network, by_hand | leaves, support)
        for name, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            by_hand[name] = by_hand[name] - (0.05 if name.startswith("head.") else 0.2) * gradient
    assert all(torch.allclose(got[name], by_hand[name], atol=1e-10) for name in params)
    assert {name for name in params if not torch.equal(got[name], params[name])} == set(moving)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_gradient_is_zero_where_nothing_depends_and_asks_for_no_grad_mode(enabled: bool) -> None:
    params = {"w": W, "unused": Y}
    with torch.set_grad_enabled(enabled):
        found = gradient_at(params, lambda at: (at["w"] ** 3).sum())
    assert torch.allclose(found["w"], 3 * W**2)
    assert torch.equal(found["unused"], torch.zeros(3))
    assert torch.equal(gradient_at({"unused": Y}, lambda at: W.sum())["unused"], torch.zeros(3))
    assert not any(value.requires_grad for value in (*found.values(), *params.values()))


def test_the_gradient_of_a_gradient() -> None:
    w = W.clone().requires_grad_()
    found = gradient_at({"w": w}, lambda at: (at["w"] ** 3).sum(), differentiable=True)
    assert torch.allclose(torch.autograd.grad(found["w"].sum(), w)[0], 6 * W)


def test_the_names_to_move_can_be_given() -> None:
    learner, params = conv_learner()
    spec = AdaptationSpec(steps=1, lr=0.1)
    got = adapt(learner, params, images(4, 0), spec, moving=["head.bias"])
    assert [name for name in params if not torch.equal(got[name], params[name])] == ["head.bias"]


def test_rows_count_by_their_weight() -> None:
    """A row of weight 2 is that row twice; one of weight 0 is no row."""
    learner, params = conv_learner()
    batch, spec = images(4, 0), AdaptationSpec(steps=2, lr=0.1)
    weighted = batch._replace(weights=torch.tensor([2.0, 1.0, 0.0, 1.0], dtype=torch.float64))
    index = torch.tensor([0, 0, 1, 3])
    plain = batch._replace(
        inputs=batch.inputs[index], targets=batch.targets[index], weights=torch.ones(4, dtype=torch.float64)
    )
    one, two = (adapt(learner, params, support, spec) for support in (weighted, plain))
    assert all(torch.allclose(one[name], two[name], atol=1e-12) for name in select(one, params))
