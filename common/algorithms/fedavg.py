"""Federated averaging (McMahan et al. 2017, arXiv:1602.05629) with the head kept at the site (FedPer, Arivazhagan
2019, arXiv:1912.00818), since label spaces differ between sites; fine-tuned at a new hospital like any start.

    phi_0 = (theta, the site's own head);  K steps;  theta <- theta + b mean_i (phi_K,i - theta)
"""

from __future__ import annotations

from common.algorithms import reptile
from common.algorithms.interface import Algorithm

ALGORITHM = Algorithm(
    title="Federated averaging",
    local_update=reptile.local_update,
    queries_per_round=lambda spec: spec.inner_steps,
    keeps=True,
    learns_to_learn=False,
)
