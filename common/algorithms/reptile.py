"""Reptile (Nichol, Achiam, Schulman 2018, arXiv:1803.02999), one site one task.

    phi_0 = theta;  phi_{k+1} = phi_k - a G(phi_k),  k = 0 .. K-1;  theta <- theta + b mean_i (phi_K,i - theta)

G is the private gradient query. The head is fresh in every round, so theta is trained for what a new
hospital will do with it: K steps from a zero head.
"""

from __future__ import annotations

from common.algorithms.descent import step
from common.algorithms.interface import Algorithm, LocalUpdate, PrivateQueries
from common.params import Params, select, subtract
from common.plan import AlgorithmSpec


def local_update(shared: Params, kept: Params, private: PrivateQueries, spec: AlgorithmSpec) -> LocalUpdate:
    """K inner steps from (theta, fresh head); the update is phi_K - theta on the shared names."""
    phi = shared | kept
    for _ in range(spec.inner_steps):
        phi = step(phi, private.gradient(phi), spec)
    return LocalUpdate(update=subtract(select(phi, shared), shared), kept=select(phi, kept))


ALGORITHM = Algorithm(title="Reptile", local_update=local_update, queries_per_round=lambda spec: spec.inner_steps)
