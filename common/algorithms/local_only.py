"""Local only: no knowledge is shared. The site asks no private query and returns a zero update, so the shared
parameters stay where the study started (the warm start), and each hospital adapts from there by itself.
"""

from __future__ import annotations

from common.algorithms.interface import Algorithm, LocalUpdate, PrivateQueries
from common.params import Params, zeros_like
from common.plan import AlgorithmSpec


def local_update(shared: Params, kept: Params, private: PrivateQueries, spec: AlgorithmSpec) -> LocalUpdate:
    """No query; no move."""
    return LocalUpdate(update=zeros_like(shared), kept=kept)


ALGORITHM = Algorithm(
    title="Local only", local_update=local_update, queries_per_round=lambda spec: 0, keeps=True, learns_to_learn=False
)
