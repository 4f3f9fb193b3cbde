"""First-order MAML (Finn, Abbeel, Levine 2017, arXiv:1703.03400) with sites as tasks: Per-FedAvg (Fallah,
Mokhtari, Ozdaglar 2020, arXiv:2002.07948).

    phi_K = K inner steps from theta on support patients;  theta <- theta - b mean_i G_query(phi_K,i)

The query step is a private query like every inner step: a plain backward pass there would have no privacy at
all. Support and query patients come from independent Poisson draws out of one pool (sequential composition).
"""

from __future__ import annotations

from common.algorithms.descent import step
from common.algorithms.interface import Algorithm, LocalUpdate, PrivateQueries
from common.params import Params, scale, select
from common.plan import AlgorithmSpec


def local_update(shared: Params, kept: Params, private: PrivateQueries, spec: AlgorithmSpec) -> LocalUpdate:
    """K inner steps, one query step; the update is -inner_lr times the query gradient on the shared names."""
    phi = shared | kept
    for _ in range(spec.inner_steps):
        phi = step(phi, private.gradient(phi), spec)
    query_gradient = private.gradient(phi)
    return LocalUpdate(update=scale(select(query_gradient, shared), -spec.inner_lr), kept=select(phi, kept))


ALGORITHM = Algorithm(
    title="First-order MAML", local_update=local_update, queries_per_round=lambda spec: spec.inner_steps + 1
)
