"""Supervised contrastive learning (Khosla et al. 2020, arXiv:2004.11362), L_out of eq. 2."""

from __future__ import annotations

import torch
from torch import Tensor

TEMPERATURE = 0.1


def supervised_contrastive(vectors: Tensor, groups: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """-mean_i 1/|P(i)| sum_{p in P(i)} log( exp(z_i.z_p / t) / sum_{a != i} exp(z_i.z_a / t) ), scalar.

    `vectors` (n, d) have norm 1; P(i) are the others of i's group in `groups` (n,). The mean is over those i that have
    such others. Raises ValueError if none has.
    """
    itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    alike = (groups.unsqueeze(0) == groups.unsqueeze(1)) & ~itself
    others = alike.sum(dim=1)
    if not bool(others.any()):
        raise ValueError(f"no two of {len(vectors)} vectors are of one group")
    closeness = vectors @ vectors.T / temperature
    logs = closeness - closeness.masked_fill(itself, float("-inf")).logsumexp(dim=1, keepdim=True)
    anchors = others > 0
    return -((logs * alike).sum(dim=1)[anchors] / others[anchors]).mean()
