"""The second phase of the warm start: the body learns to learn, from small tasks of public images.

    theta <- theta - b mean_e grad L_meta(theta; support_e, query_e)

L_meta is the plan's own algorithm's, or the prototype loss of Snell et al. (2017) where that algorithm has none. It
trains the whole body, whatever part of it will travel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from common.algorithms.maml import query_loss_after
from common.algorithms.protonet import prototype_loss
from common.episodes import Episode, MetaLoss, meta_gradients
from common.learner import Learner
from common.models import HEAD, Network, build_model, parameters, part_names
from common.params import Params, add, detach, scale
from common.plan import StudyPlan
from common.tasks import TASKS
from server.pretrain import Steps, centred
from server.public_episodes import draw_episode, sets_with_tasks
from server.public_sets import PublicSet

_LR, _EPISODES = 3e-4, 4  # Adam's; episodes in a step


def meta_train(
    body: Params, sets: Sequence[PublicSet], plan: StudyPlan, *, steps: int, seed: int, each_step: Steps = iter
) -> Params:
    """`body` after `steps` steps of Adam, centred anew.

    Raises UsageError if the plan does not classify, or no set has enough labels and patients.
    """
    usable = sets_with_tasks(sets, plan)
    network = build_model(plan.model, plan.task, ways=2, seed=seed)
    network.load_state_dict(body, strict=False)
    norm = centred(network, sets)
    theta = {name: value.clone() for name, value in body.items() if name not in norm}
    optimizer = torch.optim.Adam(theta.values(), lr=_LR)
    rng = torch.Generator().manual_seed(seed)
    gradient_of = _meta_gradient(network, norm, plan)
    for _ in each_step(range(steps)):
        episodes = [draw_episode(usable, plan.evaluation.shots, rng) for _ in range(_EPISODES)]
        mean = scale(_sum([gradient_of(theta, episode) for episode in episodes]), 1 / _EPISODES)
        for name, value in theta.items():
            value.grad = mean[name]
        optimizer.step()
    network.load_state_dict(theta, strict=False)
    return detach(theta) | centred(network, sets)


def _meta_gradient(network: Network, norm: Params, plan: StudyPlan) -> Callable[[Params, Episode], Params]:
    """The meta-gradient of one episode, from a zero head of its own width; `norm` stays as it is."""
    learner = Learner(network, TASKS["classification"])
    meta_loss = _meta_loss(network, plan)
    head = {name: value for name, value in parameters(network).items() if name.startswith(HEAD)}

    def gradient(theta: Params, episode: Episode) -> Params:
        ways = int(episode.support.targets.max()) + 1
        fixed = norm | {name: value.new_zeros(ways, *value.shape[1:]) for name, value in head.items()}
        return next(meta_gradients(learner, theta, fixed, [episode], meta_loss))

    return gradient


def _meta_loss(network: Network, plan: StudyPlan) -> MetaLoss:
    """As in a round: the inner loop moves what travels, and the head. Meta-SGD's rates are still the plan's here, so
    its loss is MAML's."""
    spec, moving = plan.algorithm, part_names(network, plan.model.trainable)
    head = [name for name in moving if name.startswith(HEAD)]
    losses = {"maml": moving, "metasgd": moving, "anil": head}
    return query_loss_after(spec, losses[spec.name]) if spec.name in losses else prototype_loss


def _sum(gradients: Sequence[Params]) -> Params:
    total, *rest = gradients
    for gradient in rest:
        total = add(total, gradient)
    return total
