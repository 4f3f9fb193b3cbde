"""Bugs that were made in private training before, planted in the real code by replacing a part of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from opacus.optimizers.optimizer import DPOptimizer
from torch import Tensor, nn

import client.audit_episodes
import client.one_run
import client.private_data
import client.selftest
import common.models
from client.audit_episodes import who_is_with_whom
from client.optimizer import PatientDPOptimizer
from client.private_data import PrivateDataset, Unprotected
from client.selftest import Check
from client.study import Study
from common.algorithms import ALGORITHMS
from common.algorithms.descent import step
from common.algorithms.interface import ClassSums, LocalUpdate, PrivateQueries
from common.episodes import Episode
from common.params import Params, scale, select
from common.plan import AlgorithmSpec

Plant = Callable[[pytest.MonkeyPatch], None]


class NoNoise(PatientDPOptimizer):
    def add_noise(self) -> None:
        for parameter in self.params:
            parameter.grad = parameter.summed_grad


class HalfNoise(PatientDPOptimizer):
    def add_noise(self) -> None:
        self.noise_multiplier /= 2
        super().add_noise()


class ClipPerImage(PatientDPOptimizer):
    """As stock Opacus: the unit is the image."""

    def group(self, patients: Tensor) -> None:
        super().group(torch.arange(len(patients)))


class ClipPerBatch(PatientDPOptimizer):
    """All who joined are clipped as one."""

    def group(self, patients: Tensor) -> None:
        self.images = len(patients)
        super().group(torch.zeros_like(patients))

    def clip_and_accumulate(self) -> None:
        super().clip_and_accumulate()
        for parameter in self.params:
            parameter.summed_grad = parameter.summed_grad * self.images


class ClipTheSum(PatientDPOptimizer):
    """The same, as `clip_grad_norm_` does it."""

    def group(self, patients: Tensor) -> None:
        super().group(torch.zeros_like(patients))


class CountInNoise(PatientDPOptimizer):
    """Opacus' make_private: what is released is divided by the private number of rows."""

    def group(self, patients: Tensor) -> None:
        super().group(patients)
        self.expected_batch_size = max(1, len(patients))


class KeepsNaN(PatientDPOptimizer):
    def clip_and_accumulate(self) -> None:
        shares = [share for parameter in self.params for share in parameter.grad_sample]
        bad = any(bool(torch.isnan(share.squares()).any()) for share in shares)
        super().clip_and_accumulate()
        for parameter in self.params if bad else ():
            parameter.summed_grad = parameter.summed_grad * math.nan


class RawHead(PrivateDataset):
    """Patients' gradients are taken under a head that was read off the raw images."""

    def gradient(self, params: Params, fixed: Params | None = None) -> Params:
        data, network = self._patients.data, self._patients.network
        features = network.body(data.inputs())
        head = torch.zeros(data.ways, features.shape[1])
        for label in data.labels.unique().tolist():
            head[label] = features[data.labels == label].mean(dim=0)
        return super().gradient(params | {"head.weight": head}, fixed)


class SumsWithoutNoise(PrivateDataset):
    """What prototypes make a head of: raw prototypes inside every later gradient."""

    def class_sums(self, params: Params) -> ClassSums:
        self._mechanism = _with_noise(self._mechanism, 1e-12)
        return super().class_sums(params)


class HalfNoiseInStatistics(PrivateDataset):
    def statistic(self, params: Params, fn: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        self._mechanism = _with_noise(self._mechanism, client.selftest.NOISE / 2)
        return super().statistic(params, fn)


class ChunkedEpisodes(PrivateDataset):
    """The list of those who joined, cut into episodes: who leaves shifts everyone behind."""

    def _episodes(self, generator: torch.Generator) -> list[Episode]:
        joined = self._draw(generator)
        size = max(2, math.ceil(len(joined) / self._mechanism.episodes))
        chunks = [joined[start : start + size] for start in range(0, len(joined), size)]
        return [
            Episode(self._side(chunk[: len(chunk) // 2], generator), self._side(chunk[len(chunk) // 2 :], generator))
            for chunk in chunks
            if len(chunk) > 1
        ]


def _with_noise(mechanism: Any, noise: float) -> Any:
    return dataclasses.replace(mechanism, noise_multiplier=noise)


def _optimizer(bug: type[DPOptimizer]) -> Plant:
    return lambda patch: patch.setattr(client.private_data, "PatientDPOptimizer", bug)


def _queries(bug: type[PrivateDataset]) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        for module in (client.selftest, client.audit_episodes, client.one_run):
            patch.setattr(module, "PrivateDataset", bug)

    return plant


def _generator(make: Callable[[], torch.Generator]) -> Plant:
    return lambda patch: patch.setattr(client.private_data, "os_generator", make)


OF_A_QUERY: Mapping[str, tuple[str, Plant]] = {  # bug -> (query that shows it, plant)
    "no noise": ("gradient", _optimizer(NoNoise)),
    "half noise": ("gradient", _optimizer(HalfNoise)),
    "clip per batch": ("gradient", _optimizer(ClipPerBatch)),
    "clip the batch's sum": ("gradient", _optimizer(ClipTheSum)),
    "clip per image": ("gradient", _optimizer(ClipPerImage)),
    "reused noise seed": ("gradient", _generator(lambda: torch.Generator().manual_seed(7))),
    "noise of the experiment's seed": ("gradient", _generator(lambda: torch.default_generator)),
    "N in the noise scale": ("gradient", _optimizer(CountInNoise)),
    "a NaN patient": ("gradient", _optimizer(KeepsNaN)),
    "raw head in the query gradient": ("gradient", _queries(RawHead)),
    "raw prototypes": ("class_sums", _queries(SumsWithoutNoise)),
    "half noise in a statistic": ("statistic", _queries(HalfNoiseInStatistics)),
}
OF_EPISODES: Mapping[str, tuple[Callable[[], Check], Plant]] = {  # bug -> (check that shows it, plant)
    "chunked episodes": (who_is_with_whom, _queries(ChunkedEpisodes)),
}


def _without_noise_at_the_query_step(
    shared: Params, kept: Params, private: PrivateQueries, spec: AlgorithmSpec
) -> LocalUpdate:
    phi = shared | kept
    for _ in range(spec.inner_steps):
        phi = step(phi, private.gradient(phi), spec)
    assert isinstance(private, PrivateDataset)
    private.gradient(phi)
    plain = private._plain_gradient(phi, Unprotected(sample_rate=0.5, max_images=9, seed=0))
    return LocalUpdate(update=scale(select(plain, shared), -spec.inner_lr), kept=select(phi, kept))


def query_step_without_noise(patch: pytest.MonkeyPatch) -> None:
    bad = dataclasses.replace(ALGORITHMS["fomaml"], local_update=_without_noise_at_the_query_step)
    patch.setitem(ALGORITHMS, "fomaml", bad)


def private_in_the_first_round_only(patch: pytest.MonkeyPatch) -> None:
    honest = Study.mechanism_in

    def mechanism_in(self: Study, round: int) -> object:
        return honest(self, round) if round == 1 else Unprotected(sample_rate=0.5, max_images=9, seed=round)

    patch.setattr(Study, "mechanism_in", mechanism_in)


def batch_norm(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(common.models, "_norm", lambda channels, modalities: nn.BatchNorm2d(channels))


def batch_norm_that_nobody_refuses(patch: pytest.MonkeyPatch) -> None:
    batch_norm(patch)
    for module in (common.models, client.private_data):
        patch.setattr(module, "refuse_batch_norm", lambda network: None)


OF_A_STUDY: Mapping[str, Plant] = {
    "un-noised query step": query_step_without_noise,
    "DP attached in round 0 only": private_in_the_first_round_only,
    "BatchNorm": batch_norm,
    "BatchNorm, its refusal taken out": batch_norm_that_nobody_refuses,
    "no noise at all": _optimizer(NoNoise),
}
