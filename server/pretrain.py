"""The lab's warm start: one body trained on public images, each data set with a head of its own.

Public images have no privacy to lose: nothing here is charged. The heads are thrown away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.augment import augment
from common.images import normalise
from common.models import HEAD, Network, build_model, feature_centre, parameters
from common.params import Params, add, scale
from common.plan import ModelSpec, TaskSpec

_LR, _WEIGHT_DECAY, _WARM_UP = 3e-3, 0.02, 50  # AdamW; steps over which the rate rises
_BATCH, _SMOOTHING, _AVERAGE = 192, 0.05, 0.995  # images; label smoothing; decay of the averaged weights


@dataclass(frozen=True)
class PublicSet:
    """One public data set."""

    name: str
    images: Tensor  # uint8 (n, C, H, W), the plan's size and channels
    labels: Tensor  # int64 (n,)
    ways: int


def pretrain(
    sets: list[PublicSet],
    model: ModelSpec,
    task: TaskSpec,
    *,
    steps: int,
    seed: int,
    each_step: Callable[[range], Iterable[int]] = iter,
) -> Params:
    """The body after `steps` steps of multi-task cross-entropy, averaged over the steps (Polyak).

    `each_step` runs through the numbers of the steps, perhaps drawing a progress bar.
    """
    rng = torch.Generator().manual_seed(seed)
    network = build_model(model, task, ways=2, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = nn.ModuleList(nn.Linear(network.head.in_features, public.ways) for public in sets)
    moving = [*network.body.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(moving, lr=_LR, weight_decay=_WEIGHT_DECAY)
    average = _body(network)
    for step in each_step(range(steps)):
        for group in optimizer.param_groups:
            group["lr"] = _LR * min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = _loss(network, heads, sets, rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay = min(_AVERAGE, (step + 1) / (step + 10))
        average = add(scale(average, decay), _body(network), scale=1 - decay)
    network.load_state_dict(average, strict=False)
    return average | feature_centre(network, torch.cat([public.images for public in sets]))


def _loss(network: Network, heads: nn.ModuleList, sets: list[PublicSet], rng: torch.Generator) -> Tensor:
    """Mean cross-entropy over the sets, on an equal share of the batch from each; one pass for all."""
    share = max(1, _BATCH // len(sets))
    rows = [torch.randint(len(public.labels), (share,), generator=rng) for public in sets]
    images = torch.cat([public.images[r] for public, r in zip(sets, rows, strict=True)])
    views = augment(images.float() / 255.0, rng) * 255.0
    with torch.autocast(images.device.type, torch.bfloat16):  # 1.7 times faster on a CPU
        features = network.body(normalise(views))
    parts = zip(heads, features.float().split(share), sets, rows, strict=True)
    losses = [
        functional.cross_entropy(head(part), public.labels[r], label_smoothing=_SMOOTHING)
        for head, part, public, r in parts
    ]
    return torch.stack(losses).mean()


def _body(network: Network) -> Params:
    return {name: value for name, value in parameters(network).items() if not name.startswith(HEAD)}
