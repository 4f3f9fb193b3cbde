"""What an algorithm gets and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from common.params import Params
from common.plan import AlgorithmSpec


class PrivateQueries(Protocol):
    """The only door to a site's images for code whose result leaves (`client.private_data`)."""

    def gradient(self, params: Params) -> Params:
        """Noisy mean over patients of the gradient of the task's loss at `params`, one entry per name.

        One charged private query.
        """
        ...


@dataclass(frozen=True)
class LocalUpdate:
    """What one round at a site yields."""

    update: Params  # leaves the site: theta + update is where this site would move the shared parameters
    head: Params  # stays at the site


LocalUpdateFunction = Callable[[Params, Params, PrivateQueries, AlgorithmSpec], LocalUpdate]


@dataclass(frozen=True)
class Algorithm:
    """One row of the registry.

    `local_update(shared, head, private, spec)` is a pure function over private queries. `head` is empty when the
    head is part of `shared`. `queries_per_round(spec)` is how many queries it makes: neither more nor fewer,
    whatever the data. `keeps_head` says whether the site's head lives on between rounds (a baseline's personal
    head) or starts from zero in every round, as it will at a new hospital.
    """

    title: str
    local_update: LocalUpdateFunction
    queries_per_round: Callable[[AlgorithmSpec], int]
    keeps_head: bool
