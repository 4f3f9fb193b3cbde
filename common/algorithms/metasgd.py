"""Meta-SGD (Li et al. 2017, arXiv:1707.09835): the inner rates are learned with the start, one for each number.

    phi_{k+1} = phi_k - alpha * grad L(phi_k; support);    both theta and alpha follow the meta-gradient

The rates travel beside the parameters. A site's own head has other shapes at other sites, so there one rate for each
of its tensors is learned.
"""

from __future__ import annotations

from torch import Tensor, full, full_like

from common.algorithms.descent import inner_loop, meta_descent
from common.algorithms.interface import Algorithm, LocalUpdate, PrivateQueries
from common.episodes import Batch, Episode
from common.inner_loop import adapt
from common.learner import Learner
from common.models import HEAD
from common.params import Params
from common.plan import AdaptationSpec, AlgorithmSpec

RATE = "rate."  # prefix of a rate's name
_HEAD = ("head.weight", "head.bias")


def rates_at_start(shared: Params, spec: AlgorithmSpec) -> Params:
    """The plan's own rates."""
    head_lr = spec.inner_lr if spec.head_lr is None else spec.head_lr
    rates = {
        RATE + name: full_like(value, head_lr if name.startswith(HEAD) else spec.inner_lr)
        for name, value in shared.items()
    }
    return {RATE + name: full((1,), head_lr) for name in _HEAD} | rates


def local_update(shared: Params, kept: Params, private: PrivateQueries, spec: AlgorithmSpec) -> LocalUpdate:
    """`meta_steps` meta-gradient steps on parameters and rates."""
    moving = [name for name in (*shared, *kept) if not name.startswith(RATE)]

    def meta_loss(learner: Learner, params: Params, episode: Episode) -> Tensor:
        phi = adapt(
            learner, params, episode.support, inner_loop(spec), moving=moving, rates=_rates(params), second_order=True
        )
        return learner.loss(learner.outputs(phi, episode.query.inputs), episode.query)

    return meta_descent(shared, kept, private, spec, meta_loss)


def adapt_by_learned_rates(
    learner: Learner, params: Params, support: Batch, spec: AdaptationSpec, algorithm: AlgorithmSpec
) -> Params:
    """Fine-tuning, each number by its own rate where one was learned."""
    return adapt(learner, params, support, spec, rates=_rates(params))


def _rates(params: Params) -> Params:
    return {name.removeprefix(RATE): value for name, value in params.items() if name.startswith(RATE)}


ALGORITHM = Algorithm(
    title="Meta-SGD",
    local_update=local_update,
    queries_per_round=lambda spec: spec.meta_steps,
    asks="episodes",
    adapt=adapt_by_learned_rates,
    extra=rates_at_start,
)
