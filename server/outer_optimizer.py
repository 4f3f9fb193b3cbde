"""The server optimiser on pseudo-gradients (Reddi et al. 2021, arXiv:2003.00295, Algorithm 2).

With u the weighted mean of the sites' updates (the negative pseudo-gradient), b the outer rate, all elementwise:

    sgd       theta <- theta + b u
    momentum  m <- beta m + u;                                            theta <- theta + b m
    adam      m <- beta m + (1-beta) u;  v <- beta2 v + (1-beta2) u^2;     theta <- theta + b m / (sqrt(v) + tau)
    yogi      m as adam;  v <- v - (1-beta2) u^2 sign(v - u^2);            theta <- theta + b m / (sqrt(v) + tau)

Momentum is FedAvgM (Hsu 2019, arXiv:1909.06335). Adam and Yogi have no bias correction, as in the paper; beta2, tau
and v_0 = tau^2 are the paper's. All of it is post-processing of what the sites released: no budget is spent.
"""

from __future__ import annotations

import torch

from common.params import Params, add, scale
from common.plan import OuterSpec

BETA2 = 0.99
TAU = 1e-3  # the degree of adaptivity: steps of entries far smaller than this are not blown up

_M, _V = "outer.m/", "outer.v/"  # prefixes of the state's names in a checkpoint


def initial_state(shared: Params, spec: OuterSpec) -> Params:
    """The optimiser's state before the first round: one or two tensors for each shared one, or none."""
    state: Params = {}
    if spec.optimizer != "sgd":
        state |= {_M + name: torch.zeros_like(value) for name, value in shared.items()}
    if spec.optimizer in ("adam", "yogi"):
        state |= {_V + name: torch.full_like(value, TAU**2) for name, value in shared.items()}
    return state


def outer_step(shared: Params, state: Params, update: Params, spec: OuterSpec) -> tuple[Params, Params]:
    """The shared parameters and the state after one round with mean update `update`; the inputs are left alone."""
    if spec.optimizer == "sgd":
        return add(shared, update, scale=spec.lr), {}
    m, v = _part(state, _M), _part(state, _V)
    if spec.optimizer == "momentum":
        m = add(update, m, scale=spec.momentum)
        return add(shared, m, scale=spec.lr), _named(_M, m)
    m = add(scale(m, spec.momentum), update, scale=1 - spec.momentum)
    square = {name: value.square() for name, value in update.items()}
    if spec.optimizer == "adam":
        v = add(scale(v, BETA2), square, scale=1 - BETA2)
    else:
        v = {name: value - (1 - BETA2) * square[name] * (value - square[name]).sign() for name, value in v.items()}
    direction = {name: value / (v[name].sqrt() + TAU) for name, value in m.items()}
    return add(shared, direction, scale=spec.lr), _named(_M, m) | _named(_V, v)


def _part(state: Params, prefix: str) -> Params:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _named(prefix: str, tensors: Params) -> Params:
    return {prefix + name: value for name, value in tensors.items()}
