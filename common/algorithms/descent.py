"""The steps that algorithms share."""

from __future__ import annotations

from common.algorithms.interface import LocalUpdate, PrivateQueries
from common.episodes import MetaLoss
from common.inner_loop import rate
from common.params import Params, add, select, subtract
from common.plan import AdaptationSpec, AlgorithmSpec


def step(params: Params, gradient: Params, spec: AlgorithmSpec) -> Params:
    """params - inner_lr * gradient; the head's entries move by `head_lr` where the plan gives one."""
    return {name: value - rate(name, inner_loop(spec)) * gradient[name] for name, value in params.items()}


def pulled_step(params: Params, gradient: Params, mean: Params, spec: AlgorithmSpec) -> Params:
    """The same with the gradient of proximal / 2 * ||params - mean||^2 added, on the names that `mean` has."""
    pull = subtract(select(params, mean), mean)
    return step(params, gradient | add(select(gradient, mean), pull, scale=spec.proximal), spec)


def inner_loop(spec: AlgorithmSpec) -> AdaptationSpec:
    """The plan's inner loop, as an adaptation."""
    return AdaptationSpec(steps=spec.inner_steps, lr=spec.inner_lr, head_lr=spec.head_lr)


def meta_descent(
    shared: Params, kept: Params, private: PrivateQueries, spec: AlgorithmSpec, meta_loss: MetaLoss
) -> LocalUpdate:
    """theta <- theta - meta_lr * G_episodes(theta), `meta_steps` times; the update is what theta moved by.

    A head of the site's own is not learned: every episode starts from it, zero.
    """
    theta = shared
    for _ in range(spec.meta_steps):
        theta = add(theta, private.episode_gradient(theta, meta_loss, fixed=kept), scale=-spec.meta_lr)
    return LocalUpdate(update=subtract(theta, shared), kept=kept)
