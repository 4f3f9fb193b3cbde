"""MAML with the exact second-order meta-gradient (Finn, Abbeel, Levine 2017, arXiv:1703.03400).

    min_theta  sum_i L_i^query(theta - a grad L_i^support(theta))

The meta-gradient goes through the inner loop and its Jacobian, so it does not split over patients: it is an episode
query, in which whole episodes are clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import Tensor

from common.algorithms.descent import inner_loop, meta_descent
from common.algorithms.interface import Algorithm, LocalUpdate, PrivateQueries
from common.episodes import Episode, MetaLoss
from common.inner_loop import adapt
from common.learner import Learner
from common.params import Params
from common.plan import AlgorithmSpec


def query_loss_after(
    spec: AlgorithmSpec, moving: Collection[str], *, rates_of: Callable[[Params], Params] | None = None
) -> MetaLoss:
    """The query loss at phi_K, where K inner steps on the support set lead; `moving` are the names that they move.

    `rates_of` says what rates the parameters themselves carry.
    """
    loop = inner_loop(spec)

    def meta_loss(learner: Learner, params: Params, episode: Episode) -> Tensor:
        rates = None if rates_of is None else rates_of(params)
        phi = adapt(learner, params, episode.support, loop, moving=moving, rates=rates, second_order=True)
        return learner.loss(learner.outputs(phi, episode.query.inputs), episode.query)

    return meta_loss


def local_update(shared: Params, kept: Params, private: PrivateQueries, spec: AlgorithmSpec) -> LocalUpdate:
    """`meta_steps` meta-gradient steps; the inner loop moves all that travels, and the head."""
    return meta_descent(shared, kept, private, spec, query_loss_after(spec, [*shared, *kept]))


ALGORITHM = Algorithm(
    title="MAML",
    local_update=local_update,
    queries_per_round=lambda spec: spec.meta_steps,
    asks="episodes",
)
