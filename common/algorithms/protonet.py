"""Prototypical networks (Snell, Swersky, Zemel 2017, arXiv:1703.05175), raw support sets.

    m_c = mean of f(x) over the support's images of class c;   log p(c | x) = -t ||f(x) - m_c||^2 + const

A support patient moves every query patient's loss, so the gradient is an episode query.
"""

from __future__ import annotations

from torch import Tensor

from common.algorithms.class_means import adapt_by_class_means, head_of, means_of
from common.algorithms.descent import meta_descent
from common.algorithms.interface import Algorithm, LocalUpdate, PrivateQueries
from common.episodes import Episode
from common.learner import Learner
from common.params import Params
from common.plan import AlgorithmSpec


def prototype_loss(learner: Learner, params: Params, episode: Episode) -> Tensor:
    """The query's cross-entropy under the support's prototypes; one of a class not in the support counts nothing."""
    means, counts = means_of(learner, params, episode.support)
    query = episode.query
    known = (counts[query.targets] > 0).to(query.weights) * query.weights
    losses = learner.task.loss(
        learner.head(head_of(means, counts), learner.features(params, query.inputs)), query.targets
    )
    return (losses * known).sum() / known.sum().clamp(min=1e-6)


def local_update(shared: Params, kept: Params, private: PrivateQueries, spec: AlgorithmSpec) -> LocalUpdate:
    """`meta_steps` steps along the episodes' gradient; there is no head to keep."""
    return meta_descent(shared, kept, private, spec, prototype_loss)


ALGORITHM = Algorithm(
    title="Prototypical networks",
    local_update=local_update,
    queries_per_round=lambda spec: spec.meta_steps,
    asks="episodes",
    adapt=adapt_by_class_means,
)
