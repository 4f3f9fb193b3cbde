"""The server optimiser against torch.optim, the paper and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.params import Params
from common.plan import OuterSpec
from server.outer_optimizer import BETA2, TAU, initial_state, outer_step

ROUNDS = 6


@pytest.fixture
def updates() -> list[Params]:
    rng = torch.Generator().manual_seed(3)
    return [{"w": torch.randn(4, 3, generator=rng), "b": torch.randn(3, generator=rng)} for _ in range(ROUNDS)]


def zeros() -> Params:
    return {"w": torch.zeros(4, 3), "b": torch.zeros(3)}


def run(spec: OuterSpec, updates: list[Params]) -> list[Params]:
    shared = zeros()
    state, path = initial_state(shared, spec), []
    for update in updates:
        shared, state = outer_step(shared, state, update, spec)
        path.append(shared)
    return path


@pytest.mark.parametrize(("name", "momentum"), [("sgd", 0.0), ("momentum", 0.7)])
def test_sgd_and_momentum_are_torchs(updates, name, momentum):
    path = run(OuterSpec(optimizer=name, lr=0.3, momentum=momentum), updates)
    theirs = {key: torch.nn.Parameter(value) for key, value in zeros().items()}
    optimizer = torch.optim.SGD(theirs.values(), lr=0.3, momentum=momentum)
    for update, ours in zip(updates, path, strict=True):
        for key, parameter in theirs.items():
            parameter.grad = -update[key]
        optimizer.step()
        for key in theirs:
            torch.testing.assert_close(ours[key], theirs[key].detach())


@pytest.mark.parametrize("name", ["adam", "yogi"])
def test_adam_and_yogi_by_the_paper(updates, name):
    """Algorithm 2 of Reddi et al. 2021, written out in numpy."""
    path = run(OuterSpec(optimizer=name, lr=0.05, momentum=0.8), updates)
    for key in ("w", "b"):
        x = m = np.zeros_like(updates[0][key].numpy(), dtype=np.float64)
        v = np.full_like(x, TAU**2)
        for update, ours in zip(updates, path, strict=True):
            u = update[key].numpy().astype(np.float64)
            m = 0.8 * m + 0.2 * u
            v = BETA2 * v + (1 - BETA2) * u**2 if name == "adam" else v - (1 - BETA2) * u**2 * np.sign(v - u**2)
            x = x + 0.05 * m / (np.sqrt(v) + TAU)
            assert ours[key].numpy() == pytest.approx(x, rel=1e-4, abs=1e-6)


def test_momentum_of_a_constant_update_approaches_its_limit():
    """m_t = u (1 - beta^t) / (1 - beta)."""
    spec = OuterSpec(optimizer="momentum", lr=1.0, momentum=0.5)
    update = {"w": torch.ones(4, 3), "b": torch.ones(3)}
    path = run(spec, [update] * 20)
    steps = [(b["b"] - a["b"])[0].item() for a, b in zip([zeros(), *path], path, strict=False)]
    assert steps == pytest.approx([(1 - 0.5**t) / 0.5 for t in range(1, 21)], rel=1e-5)


def test_adam_of_a_constant_update():
    """m_t = u (1 - beta^t), v_t = u^2 - (u^2 - tau^2) beta2^t: the first step is (1 - beta) u / (sqrt(v_1) + tau)."""
    path = run(OuterSpec(optimizer="adam", lr=1.0, momentum=0.9), [{"w": torch.full((4, 3), 2.0), "b": torch.ones(3)}])
    v = 4 - (4 - TAU**2) * BETA2
    assert path[0]["w"] == pytest.approx(torch.full((4, 3), 0.1 * 2 / (v**0.5 + TAU)), rel=1e-5)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "yogi"])
def test_a_zero_update_moves_nothing_and_inputs_stay(name):
    spec = OuterSpec(optimizer=name)
    shared = {"w": torch.ones(2)}
    state = initial_state(shared, spec)
    before = {key: value.clone() for key, value in state.items()}
    after, _ = outer_step(shared, state, {"w": torch.zeros(2)}, spec)
    assert after["w"].equal(torch.ones(2))
    outer_step(shared, state, {"w": torch.ones(2)}, spec)
    assert shared["w"].equal(torch.ones(2))
    assert all(state[key].equal(before[key]) for key in before)


@pytest.mark.parametrize(("name", "tensors"), [("sgd", 0), ("momentum", 2), ("adam", 4), ("yogi", 4)])
def test_the_state_has_a_tensor_for_each_parameter(name, tensors):
    shared, spec = zeros(), OuterSpec(optimizer=name)
    state = initial_state(shared, spec)
    assert len(state) == tensors
    assert not state.keys() & shared.keys()
    _, after = outer_step(shared, state, shared, spec)
    assert after.keys() == state.keys()
