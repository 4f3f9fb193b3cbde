"""Meta-SGD (Li et al. 2017, arXiv:1707.09835): the inner rates are learned with the start, one for each number.

    phi_{k+1} = phi_k - alpha * grad L(phi_k; support);    both theta and alpha follow the meta-gradient

The rates travel beside the parameters. A site's own head has other shapes at other sites, so there one rate for each
of its tensors is learned.
"""

from __future__ import annotations

from torch import full, full_like

from common.algorithms.descent import inner_loop, meta_descent
from common.algorithms.interface import Algorithm, LocalUpdate, PrivateQueries
from common.algorithms.maml import query_loss_after
from common.episodes import Batch
from common.inner_loop import adapt, rate
from common.learner import Learner
from common.params import Params, within
from common.plan import AdaptationSpec, AlgorithmSpec

RATE = "rate."  # prefix of a rate's name
_HEAD = ("head.weight", "head.bias")


def rates_at_start(shared: Params, spec: AlgorithmSpec) -> Params:
    """The plan's own rates."""
    known = inner_loop(spec)
    rates = {RATE + name: full_like(value, rate(name, known)) for name, value in shared.items()}
    return {RATE + name: full((1,), rate(name, known)) for name in _HEAD} | rates


def local_update(shared: Params, kept: Params, private: PrivateQueries, spec: AlgorithmSpec) -> LocalUpdate:
    """`meta_steps` meta-gradient steps on parameters and rates."""
    moving = [name for name in (*shared, *kept) if not name.startswith(RATE)]
    return meta_descent(shared, kept, private, spec, query_loss_after(spec, moving, rates_of=_rates))


def adapt_by_learned_rates(
    learner: Learner, params: Params, support: Batch, spec: AdaptationSpec, algorithm: AlgorithmSpec
) -> Params:
    """Fine-tuning, each number by its own rate where one was learned."""
    return adapt(learner, params, support, spec, rates=_rates(params))


def _rates(params: Params) -> Params:
    return within(params, RATE)


ALGORITHM = Algorithm(
    title="Meta-SGD",
    local_update=local_update,
    queries_per_round=lambda spec: spec.meta_steps,
    asks="episodes",
    adapt=adapt_by_learned_rates,
    extra=rates_at_start,
)
