"""The first phase of the lab's warm start: one body trained on public images, each data set with a head of its own.

Public images have no privacy to lose: nothing here is charged. The heads are thrown away, but for that of an
autoencoder, which belongs to no task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from common.models import BODY, HEAD, Network, build_model, feature_centre, parameters
from common.params import Params, add, scale
from common.plan import StudyPlan
from server.public_sets import Lesson, PublicSet, lessons_of

Steps = Callable[[range], Iterable[int]]  # runs through the numbers of the steps, perhaps drawing a progress bar

_LR, _WEIGHT_DECAY, _WARM_UP = 3e-3, 0.02, 50  # AdamW; steps over which the rate rises
_AVERAGE = 0.995  # decay of the averaged weights
_BATCH = {"conv4": 192, "resnet": 192, "unet": 16, "autoencoder": 48}  # images; of pixels each one has thousands


def pretrain(sets: Sequence[PublicSet], plan: StudyPlan, *, steps: int, seed: int, each_step: Steps = iter) -> Params:
    """The body after `steps` steps on the mean of the sets' losses, averaged over the steps (Polyak), and centred.

    Raises DataError if the sets teach nothing of the plan's kind of task.
    """
    lessons = lessons_of(sets, plan)
    rng = torch.Generator().manual_seed(seed)
    network = build_model(plan.model, plan.task, ways=2, seed=seed)
    heads = _heads(network, lessons, plan, seed)
    kept = (BODY, HEAD) if plan.model.name == "autoencoder" else (BODY,)
    optimizer = torch.optim.AdamW([*network.body.parameters(), *heads.parameters()], lr=_LR, weight_decay=_WEIGHT_DECAY)
    average = _values(network, kept)
    share = max(1, _BATCH[plan.model.name] // len(lessons))
    for step in each_step(range(steps)):
        for group in optimizer.param_groups:
            group["lr"] = _LR * min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = _loss(network, heads, lessons, share, rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay = min(_AVERAGE, (step + 1) / (step + 10))
        average = add(scale(average, decay), _values(network, kept), scale=1 - decay)
    network.load_state_dict(average, strict=False)
    return average | centred(network, sets)


def centred(network: Network, sets: Sequence[PublicSet]) -> Params:
    """Centre and gain of the body's features over all public images."""
    return feature_centre(network, torch.cat([public.inputs() for public in sets]))


def _heads(network: Network, lessons: Sequence[Lesson], plan: StudyPlan, seed: int) -> nn.ModuleList:
    if plan.model.name == "autoencoder":
        return nn.ModuleList([network.head] * len(lessons))
    return nn.ModuleList(build_model(plan.model, plan.task, ways=lesson.ways, seed=seed).head for lesson in lessons)


def _loss(
    network: Network, heads: nn.ModuleList, lessons: Sequence[Lesson], share: int, rng: torch.Generator
) -> Tensor:
    """Mean loss over the sets, on `share` images of each; one pass of the body for all."""
    inputs, targets = zip(*(lesson.draw(share, rng) for lesson in lessons), strict=True)
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # 1.7 times faster; without AVX-512 ten times slower
    with torch.autocast("cpu", torch.bfloat16, enabled=fast):
        features = network.body(torch.cat(inputs))
    parts = zip(lessons, heads, features.float().split(share), targets, strict=True)
    return torch.stack([lesson.task.loss(head(part), right).mean() for lesson, head, part, right in parts]).mean()


def _values(network: Network, prefixes: tuple[str, ...]) -> Params:
    return {name: value for name, value in parameters(network).items() if name.startswith(prefixes)}
