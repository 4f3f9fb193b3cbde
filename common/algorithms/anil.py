"""ANIL, almost no inner loop (Raghu et al. 2020, arXiv:1909.09157): MAML whose inner loop moves the head only.

The body is learned so that a head on its features learns fast; the meta-gradient still goes through the head's steps.
"""

from __future__ import annotations

from common.algorithms.descent import meta_descent
from common.algorithms.interface import Algorithm, LocalUpdate, PrivateQueries
from common.algorithms.maml import query_loss_after
from common.models import HEAD
from common.params import Params
from common.plan import AlgorithmSpec


def local_update(shared: Params, kept: Params, private: PrivateQueries, spec: AlgorithmSpec) -> LocalUpdate:
    """`meta_steps` meta-gradient steps on all that travels."""
    head = [name for name in (*shared, *kept) if name.startswith(HEAD)]
    return meta_descent(shared, kept, private, spec, query_loss_after(spec, head))


ALGORITHM = Algorithm(
    title="ANIL",
    local_update=local_update,
    queries_per_round=lambda spec: spec.meta_steps,
    asks="episodes",
)
