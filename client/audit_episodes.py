"""The self-test of episode queries, which takes seconds: part of the audit.

A drawn canary turns the gradient of its episode around, from -C to C: the worst that 2 C allows for. In a second check
the lowest number in an episode decides: harmless where each patient picks an episode by itself, and ruinous where the
list of those who joined is cut into episodes, for who joins first then shifts everybody.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from client.data.dataset import SiteData
from client.grant import Grant
from client.private_data import Mechanism, Patients, PrivateDataset
from client.selftest import CLIP, NOISE, Check, balanced_coins, examined
from common.episodes import Episode
from common.learner import Learner
from common.models import Network
from common.params import Params
from common.tasks import Task

_PATIENTS = 32  # the first is the canary; each is known by its label
_SIDE = 4


def episode_checks() -> Iterator[Check]:
    """Both checks."""
    yield turned_around()
    yield who_is_with_whom()


def turned_around() -> Check:
    """Two episodes at -C: at -2C in all without the canary, at 0 with it."""
    way = _way()
    return examined("episode_gradient", lambda: _releases(_by_canary, episodes=2, count=960), way.unsqueeze(0), -way)


def who_is_with_whom() -> Check:
    """Four episodes whose ways hang on chance alone, or on who joined before whom."""
    way = _way()
    return examined(
        "episode_gradient, who is with whom",
        lambda: _releases(_by_lowest, episodes=4, count=640),
        way.unsqueeze(0),
        torch.zeros_like(way),
        blind=True,
    )


def _way() -> Tensor:
    """Of every episode's pull, of length 1."""
    size = _PATIENTS * _SIDE**2
    return torch.full((size,), 1 / math.sqrt(size), dtype=torch.float64)


def _by_canary(labels: Tensor) -> float:
    return 1.0 if bool((labels == 0).any()) else -1.0


def _by_lowest(labels: Tensor) -> float:
    return 1.0 if int(labels.min()) % 2 == 0 else -1.0


def _releases(sign_of: Callable[[Tensor], float], *, episodes: int, count: int) -> tuple[Tensor, Tensor]:
    """(releases (R, d) in units of 2 C, coins (R, 1)); every episode pulls by C, the way that `sign_of` says."""

    def meta_loss(learner: Learner, params: Params, episode: Episode) -> Tensor:
        labels = torch.cat([episode.support.targets, episode.query.targets])
        return 100 * CLIP * sign_of(labels) * params["head.weight"].sum()

    labels = torch.arange(_PATIENTS)
    data = SiteData(
        site="drawn",
        images=torch.zeros(_PATIENTS, 1, _SIDE, _SIDE, dtype=torch.uint8),
        labels=labels,
        patients=labels,
        label_names=tuple(map(str, range(_PATIENTS))),
        patient_ids=tuple(map(str, range(_PATIENTS))),
        split=("train",) * _PATIENTS,
    )
    network = Network(nn.Flatten(), nn.Linear(_SIDE**2, _PATIENTS, bias=False))
    task = Task(loss=lambda outputs, targets: outputs.sum(1), score=lambda outputs, targets: torch.zeros(len(targets)))
    mechanism = Mechanism(
        sample_rate=1.0, noise_multiplier=NOISE, clip=CLIP, batch=1.0, max_images=1, episodes=episodes
    )
    head = {"head.weight": torch.zeros(_PATIENTS, _SIDE**2)}
    with_canary, without = (Patients(rows, network, task) for rows in (data, data.rows(labels[1:])))
    coins, found = balanced_coins(count, 1), []
    with torch.random.fork_rng(devices=[]):
        for coin in coins:
            torch.manual_seed(0)
            private = PrivateDataset(with_canary if coin else without, mechanism, Grant(1))
            found.append(private.episode_gradient(head, meta_loss)["head.weight"].double().flatten())
    return torch.stack(found) * (episodes / (2 * CLIP)), coins
