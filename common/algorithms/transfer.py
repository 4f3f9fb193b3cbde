"""Transfer: what most would do without a federation. One body is pre-trained on public images for many tasks at once
(`consilium-lab pretrain`), and a hospital fine-tunes it; nobody asks a private query.
"""

from __future__ import annotations

from common.algorithms import local_only
from common.algorithms.interface import Algorithm

ALGORITHM = Algorithm(
    title="Transfer: warm start, fine-tuned",
    local_update=local_only.local_update,
    queries_per_round=lambda spec: 0,
    keeps=True,
    learns_to_learn=False,
)
