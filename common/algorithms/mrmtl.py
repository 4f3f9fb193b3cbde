"""MR-MTL, mean-regularised multi-task learning (Liu et al. 2022, arXiv:2206.07902): every hospital has a whole model of
its own, pulled to the mean of all. Under privacy it asks no more queries than averaging.

    w_i <- w_i - a (G(w_i) + lambda (w_i - theta)),  K steps;    theta <- theta + b mean_i (w_i - theta)

lambda = 0 would be learning alone, a large one averaging. The hospital keeps w_i between rounds.
"""

from __future__ import annotations

from common.algorithms.descent import pulled_step
from common.algorithms.interface import Algorithm, LocalUpdate, PrivateQueries
from common.episodes import Batch
from common.inner_loop import adapt
from common.learner import Learner
from common.params import Params, select, subtract
from common.plan import AdaptationSpec, AlgorithmSpec

PERSONAL = "personal."  # prefix of the names of what the site keeps of its own model


def local_update(shared: Params, kept: Params, private: PrivateQueries, spec: AlgorithmSpec) -> LocalUpdate:
    """K pulled steps of the site's own model; the update is how far it lies from the mean."""
    head = {name: value for name, value in kept.items() if not name.startswith(PERSONAL)}
    own = {name: kept.get(PERSONAL + name, value) for name, value in shared.items()}
    phi = own | head
    for _ in range(spec.inner_steps):
        phi = pulled_step(phi, private.gradient(phi), shared, spec)
    own = select(phi, shared)
    personal = {PERSONAL + name: value for name, value in own.items()}
    return LocalUpdate(update=subtract(own, shared), kept=select(phi, head) | personal)


def adapt_near_the_mean(
    learner: Learner, params: Params, support: Batch, spec: AdaptationSpec, algorithm: AlgorithmSpec
) -> Params:
    """Fine-tuning with the same pull to where it begins."""
    return adapt(learner, params, support, spec, pull=algorithm.proximal)


ALGORITHM = Algorithm(
    title="MR-MTL",
    local_update=local_update,
    queries_per_round=lambda spec: spec.inner_steps,
    keeps=True,
    learns_to_learn=False,
    adapt=adapt_near_the_mean,
)
