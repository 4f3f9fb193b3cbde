"""The steps that algorithms share."""

from __future__ import annotations

from common.algorithms.interface import LocalUpdate, PrivateQueries
from common.episodes import MetaLoss
from common.models import HEAD
from common.params import Params, add, subtract
from common.plan import AdaptationSpec, AlgorithmSpec


def step(params: Params, gradient: Params, spec: AlgorithmSpec) -> Params:
    """params - inner_lr * gradient; the head's entries move by `head_lr` where the plan gives one."""
    head_lr = spec.inner_lr if spec.head_lr is None else spec.head_lr
    return {
        name: value - (head_lr if name.startswith(HEAD) else spec.inner_lr) * gradient[name]
        for name, value in params.items()
    }


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
