"""PrivateDataset: the only door to images for code whose result leaves the site.

Its methods are private queries. Each spends one unit of a grant that the ledger has charged beforehand; without
a grant nothing is computed. An algorithm that holds nothing else is private by construction.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from opacus import GradSampleModule
from torch import Tensor, nn

from client.data.dataset import SiteData
from client.grant import Grant
from client.optimizer import PatientDPOptimizer, draw_patients, os_generator
from common.errors import UnchargedQuery
from common.models import HEAD, refuse_batch_norm
from common.params import Params
from common.tasks import Task

# Opacus hooks the first layer too, whose input (the images) needs no gradient.
warnings.filterwarnings("ignore", message="Full backward hook is firing")


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """The public constants of a site's queries; noise std of a gradient query = noise_multiplier * clip / batch."""

    sample_rate: float  # q
    noise_multiplier: float  # z
    clip: float  # C
    batch: float  # B = q * declared N: a public constant, never a drawn or counted size
    max_images: int  # M per patient
    head_scale: float = 1.0  # the head's gradients are multiplied by it before clipping, divided after the noise


@dataclass(frozen=True, kw_only=True)
class Unprotected:
    """Queries without clipping and noise, reproducible from `seed`: simulation of `privacy: none` only."""

    sample_rate: float
    max_images: int
    seed: int


class Patients:
    """A site's training images by patient, and the network through which queries see them.

    Raises ValueError for a network with BatchNorm.
    """

    def __init__(
        self, data: SiteData, network: nn.Module, task: Task, *, device: str = "cpu", chunk_images: int = 256
    ) -> None:
        refuse_batch_norm(network)
        self.data, self.network, self.task, self.device = data, network.to(device), task, device
        self.chunk_images = chunk_images  # bounds memory: images in one physical batch
        order = torch.argsort(data.patients, stable=True)
        _, counts = torch.unique_consecutive(data.patients[order], return_counts=True)
        self.images_of = torch.split(order, counts.tolist())  # row numbers of each patient

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images (n, C, H, W) and labels (n,) on the device."""
        return self.data.normalised(rows).to(self.device), self.data.labels[rows].to(self.device)

    def draw(self, *, sample_rate: float, max_images: int, generator: torch.Generator) -> list[Tensor]:
        """Row numbers of each patient who joined, at most `max_images` of each, drawn at random."""
        joined = draw_patients(len(self.images_of), sample_rate=sample_rate, generator=generator)
        return [_at_most(self.images_of[p], max_images, generator) for p in joined.tolist()]

    def chunks(self, drawn: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """(row numbers, patient of each row) in physical batches cut between patients; at least one, maybe empty."""
        chunks: list[list[tuple[int, Tensor]]] = [[]]
        filled = 0
        for patient, rows in enumerate(drawn):
            if filled and filled + len(rows) > self.chunk_images:
                chunks.append([])
                filled = 0
            chunks[-1].append((patient, rows))
            filled += len(rows)
        return [_stack(chunk) for chunk in chunks]


def _at_most(rows: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)[:limit]]


def _stack(chunk: list[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
    empty = torch.zeros(0, dtype=torch.int64)
    rows = torch.cat([empty, *(rows for _, rows in chunk)])
    patients = torch.cat([empty, *(torch.full((len(rows),), patient) for patient, rows in chunk)])
    return rows, patients


class PrivateDataset:
    """Private queries on one site's patients; see the module's docstring.

    `gradient`  Poisson-subsampled Gaussian, patient level, sensitivity C
    `score`     Poisson-subsampled Gaussian on per-patient means in [0, 1]
    """

    def __init__(self, patients: Patients, mechanism: Mechanism | Unprotected, grant: Grant) -> None:
        self._patients, self._mechanism, self._grant = patients, mechanism, grant
        self._unprotected = torch.Generator()
        if isinstance(mechanism, Unprotected):
            self._unprotected.manual_seed(mechanism.seed)

    def gradient(self, params: Params) -> Params:
        """Noisy mean over patients of the gradient of the task's loss at `params`; one entry per name.

        All of the network's parameters that are not in `params` are held fixed.
        """
        self._grant.use()
        network = self._patients.network
        _load(network, params)
        buffers = [buffer.clone() for buffer in network.buffers()]
        if isinstance(self._mechanism, Unprotected):
            gradient = self._plain_gradient(params)
        else:
            gradient = self._private_gradient(params, self._mechanism)
        if any(not torch.equal(a, b) for a, b in zip(buffers, network.buffers(), strict=True)):
            raise UnchargedQuery("a buffer of the network changed during a query: it would carry data out")
        return gradient

    def score(self, params: Params) -> float:
        """Noisy mean over patients of the task's score in [0, 1] at `params`, clamped to [0, 1].

        Scores are centred at 1/2, so zeroing one patient moves the sum by at most 1/2: noise std = z / (2 B).
        """
        return float(self.statistic(params, self._patients.task.score)[0])

    def statistic(self, params: Params, fn: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Noisy mean over patients of fn(logits, labels), (n,) or (n, k) in [0, 1], averaged inside the patient.

        Returns (k,) clamped to [0, 1]. Centred at 1/2 the sensitivity is sqrt(k)/2: noise std = z sqrt(k) / (2 B).
        """
        self._grant.use()
        network = self._patients.network
        _load(network, params)
        generator = self._generator()
        drawn = self._draw(generator)
        sums = [self._centred_sum(rows, patient, fn) for rows, patient in self._patients.chunks(drawn)]
        total = torch.stack(sums).sum(dim=0)
        if isinstance(self._mechanism, Unprotected):
            return (total / max(1, len(drawn)) + 0.5).float()
        radius = total.numel() ** 0.5 / 2
        noise = torch.normal(0.0, self._mechanism.noise_multiplier * radius, total.shape, generator=generator)
        return ((total + noise) / self._mechanism.batch + 0.5).clamp(0.0, 1.0).float()

    def _centred_sum(self, rows: Tensor, patient: Tensor, fn: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Sum over patients of (mean over the patient's images - 1/2), each clipped to norm sqrt(k)/2; float64 (k,)."""
        images_in, labels = self._patients.batch(rows)
        with torch.no_grad():
            values = fn(self._patients.network(images_in), labels).double().cpu()
        values = values.unsqueeze(1) if values.dim() == 1 else values
        _, index, images = torch.unique(patient, return_inverse=True, return_counts=True)
        means = torch.zeros(len(images), values.shape[1], dtype=torch.float64).index_add_(0, index, values - 0.5)
        means = means / images.reshape(-1, 1)
        norms = means.norm(dim=1, keepdim=True)
        radius = values.shape[1] ** 0.5 / 2
        clipped = means * (radius / norms.clamp(min=radius))
        return torch.where(torch.isfinite(norms), clipped, torch.zeros_like(means)).sum(dim=0)

    def _generator(self) -> torch.Generator:
        return self._unprotected if isinstance(self._mechanism, Unprotected) else os_generator()

    def _draw(self, generator: torch.Generator) -> list[Tensor]:
        mechanism = self._mechanism
        return self._patients.draw(
            sample_rate=mechanism.sample_rate, max_images=mechanism.max_images, generator=generator
        )

    def _private_gradient(self, params: Params, mechanism: Mechanism) -> Params:
        generator = os_generator()
        chunks = self._patients.chunks(self._draw(generator))
        network = self._patients.network
        wrapped = GradSampleModule(network, loss_reduction="sum")
        try:
            trained = {name: value for name, value in network.named_parameters() if value.requires_grad}
            optimizer = PatientDPOptimizer(
                torch.optim.SGD(trained.values(), lr=1.0),
                scales=[mechanism.head_scale if name.startswith(HEAD) else 1.0 for name in trained],
                noise_multiplier=mechanism.noise_multiplier,
                max_grad_norm=mechanism.clip,
                expected_batch_size=mechanism.batch,
                generator=generator,
            )
            for number, (rows, patient) in enumerate(chunks):
                optimizer.zero_grad()
                self._losses(wrapped, rows).sum().backward()
                optimizer.group(patient)
                optimizer.signal_skip_step(do_skip=number < len(chunks) - 1)  # type: ignore[no-untyped-call]
                optimizer.pre_step()
            gradients = _gradients(network, params)
            optimizer.zero_grad()
            return gradients
        finally:
            wrapped.to_standard_module()

    def _plain_gradient(self, params: Params) -> Params:
        drawn = self._draw(self._generator())
        network = self._patients.network
        network.zero_grad()
        for rows, patient in self._patients.chunks(drawn):
            images = torch.bincount(patient, minlength=len(drawn)).float()
            weights = 1.0 / (images[patient] * max(1, len(drawn)))
            (self._losses(network, rows) * weights.to(self._patients.device)).sum().backward()
        return _gradients(network, params)

    def _losses(self, network: nn.Module, rows: Tensor) -> Tensor:
        images, labels = self._patients.batch(rows)
        return self._patients.task.loss(network(images), labels)


def _load(network: nn.Module, params: Params) -> None:
    """Put `params` into the network and let exactly these be trained."""
    known = dict(network.named_parameters())
    if unknown := params.keys() - known.keys():
        raise ValueError(f"the network has no parameters {sorted(unknown)}")
    network.train()
    with torch.no_grad():
        for name, parameter in known.items():
            parameter.requires_grad_(name in params)
            if name in params:
                parameter.copy_(params[name])


def _gradients(network: nn.Module, params: Params) -> Params:
    """The finished gradients on the CPU; nothing of this query stays in the network."""
    gradients: Params = {}
    for name, parameter in network.named_parameters():
        if name in params and parameter.grad is not None:
            gradients[name] = parameter.grad.detach().cpu().clone()
        parameter.grad = None
    return gradients
