"""Model mapping: the shared knowledge is a network that sets another network's parameters for a task.

    T      = encoder(noisy prototypes)          what the site's task looks like
    phi    = M(T, K; psi)                       scales and shifts of the backbone's normalisation layers
    psi   <- psi - a J^T G(phi),  J = d phi / d psi

G is an ordinary private gradient in phi, a few hundred numbers; its way back through M is post-processing. A new
hospital shows its support set to the encoder and gets a backbone of its own before the first step. See
`common.mapping`.
"""

from __future__ import annotations

import torch

from common.algorithms.class_means import means_of
from common.algorithms.descent import step
from common.algorithms.interface import Algorithm, LocalUpdate, PrivateQueries
from common.algorithms.prototypes import memory_of, prototypes_of, remembered
from common.episodes import Batch
from common.inner_loop import adapt
from common.learner import Learner
from common.mapping import MAPPING, modulate, task_vector
from common.models import HEAD
from common.params import Params, subtract
from common.plan import AdaptationSpec, AlgorithmSpec


def local_update(shared: Params, kept: Params, private: PrivateQueries, spec: AlgorithmSpec) -> LocalUpdate:
    """One class sum for the task vector, then `inner_steps` steps on the mapping and a fresh head."""
    network, public = private.learner.network, private.public
    sums = remembered(kept, private.class_sums({}))
    task = task_vector(network, public, prototypes_of(sums)[0])
    psi = {name: value for name, value in shared.items() if name.startswith(MAPPING)}
    head = {name: torch.zeros_like(value) for name, value in kept.items() if name.startswith(HEAD)}
    head |= {name: value for name, value in shared.items() if name.startswith(HEAD)}
    start = psi | head
    for _ in range(spec.inner_steps):
        leaves = {name: value.detach().requires_grad_() for name, value in psi.items()}
        film = modulate(network, public | leaves, task)
        gradient = private.gradient({name: value.detach() for name, value in film.items()} | head)
        pulled_back = torch.autograd.grad(
            list(film.values()), list(leaves.values()), [gradient[name] for name in film], allow_unused=False
        )
        psi = step(psi, dict(zip(psi, pulled_back, strict=True)), spec)
        head = step(head, {name: gradient[name] for name in head}, spec)
    moved = subtract(psi | head, start)
    own_head = {name: value for name, value in head.items() if name not in shared}
    backbone = modulate(network, public | psi, task)
    return LocalUpdate(update={name: moved[name] for name in shared}, kept=own_head | backbone | memory_of(sums))


def adapt_a_mapped_backbone(
    learner: Learner, params: Params, support: Batch, spec: AdaptationSpec, algorithm: AlgorithmSpec
) -> Params:
    """The support set's own prototypes say the task; then fine-tuning as always."""
    means, _ = means_of(learner, params, support)
    film = modulate(learner.network, params, task_vector(learner.network, params, means))
    mapped = params | {name: value.detach() for name, value in film.items()}
    return adapt(learner, mapped, support, spec)


ALGORITHM = Algorithm(
    title="Model mapping",
    local_update=local_update,
    queries_per_round=lambda spec: spec.inner_steps + 1,
    adapt=adapt_a_mapped_backbone,
    keeps=True,
    adapts_body=True,
)
