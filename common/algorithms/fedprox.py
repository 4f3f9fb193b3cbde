"""FedProx (Li et al. 2020, arXiv:1812.06127): federated averaging with a proximal pull to the shared parameters.

    phi_{k+1} = phi_k - a (G(phi_k) + mu (phi_k - theta))

The pull needs no data: it is post-processing of earlier releases.
"""

from __future__ import annotations

from common.algorithms.descent import pulled_step
from common.algorithms.interface import Algorithm, LocalUpdate, PrivateQueries
from common.params import Params, select, subtract
from common.plan import AlgorithmSpec


def local_update(shared: Params, kept: Params, private: PrivateQueries, spec: AlgorithmSpec) -> LocalUpdate:
    """K proximal steps; the update is phi_K - theta on the shared names. The head is not pulled."""
    phi = shared | kept
    for _ in range(spec.inner_steps):
        phi = pulled_step(phi, private.gradient(phi), shared, spec)
    return LocalUpdate(update=subtract(select(phi, shared), shared), kept=select(phi, kept))


ALGORITHM = Algorithm(
    title="FedProx",
    local_update=local_update,
    queries_per_round=lambda spec: spec.inner_steps,
    keeps=True,
    learns_to_learn=False,
)
