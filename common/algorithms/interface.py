"""What an algorithm gets and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from common.episodes import Batch, MetaLoss
from common.inner_loop import adapt
from common.learner import Learner
from common.params import Params
from common.plan import AdaptationSpec, AlgorithmSpec


class ClassSums(NamedTuple):
    """Noisy sums over patients of their mean clipped features, and of their shares of images, by class."""

    features: Tensor  # (ways, F)
    counts: Tensor  # (ways,)
    std: float  # of the noise in each number of `features`


class PrivateQueries(Protocol):
    """The only door to a site's images for code whose result leaves (`client.private_data`). Each call is one charged
    private query; `learner` holds no data."""

    @property
    def learner(self) -> Learner: ...

    @property
    def public(self) -> Params:
        """All of the network's parameters as the study began: what a query is not given stays as it is here."""
        ...

    def gradient(self, params: Params, fixed: Params | None = None) -> Params:
        """Noisy mean over patients of the gradient of the task's loss at `params`, one entry per name.

        `fixed` are parameters that the network has, too, but that no gradient is taken in.
        """
        ...

    def episode_gradient(self, params: Params, meta_loss: MetaLoss, fixed: Params | None = None) -> Params:
        """Noisy mean over the plan's number of episodes of the gradient of `meta_loss` at `params`."""
        ...

    def class_sums(self, params: Params) -> ClassSums:
        """Noisy sums of the features under `params` by class."""
        ...


@dataclass(frozen=True)
class LocalUpdate:
    """What one round at a site yields."""

    update: Params  # leaves the site: theta + update is where this site would move the shared parameters
    kept: Params  # stays at the site


LocalUpdateFunction = Callable[[Params, Params, PrivateQueries, AlgorithmSpec], LocalUpdate]
AdaptFunction = Callable[[Learner, Params, Batch, AdaptationSpec, AlgorithmSpec], Params]
ExtraFunction = Callable[[Params, AlgorithmSpec], Params]


def descend(learner: Learner, params: Params, support: Batch, spec: AdaptationSpec, algorithm: AlgorithmSpec) -> Params:
    """Plain fine-tuning, as most algorithms prepare for."""
    return adapt(learner, params, support, spec)


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """One row of the registry.

    `local_update(shared, kept, private, spec)` is a pure function over private queries. `kept` is what the site keeps:
    its head unless that is part of `shared`, and what the algorithm itself put there in the round before.
    `queries_per_round(spec)` is how many queries it makes: neither more nor fewer, whatever the data.
    `adapt` is how a new hospital starts from what was learned; only the support set is looked at.
    `extra(shared, spec)` are further parameters that travel beside the network's, at their start.
    `keeps` says whether what the site keeps lives on between rounds (a baseline's personal head) or starts from zero
    in every round, as it will at a new hospital.
    """

    title: str
    local_update: LocalUpdateFunction
    queries_per_round: Callable[[AlgorithmSpec], int]
    keeps: bool = False
    asks: Literal["patients", "episodes"] = "patients"  # what its gradient queries clip
    learns_to_learn: bool = True  # False: a baseline
    adapt: AdaptFunction = descend
    adapts_body: bool = False  # True: even if the plan adapts the head alone
    extra: ExtraFunction = lambda shared, spec: {}
