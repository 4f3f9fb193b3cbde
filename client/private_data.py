"""PrivateDataset: the only door to images for code whose result leaves the site.

Its methods are private queries. Each spends one unit of a grant that the ledger has charged beforehand; without
a grant nothing is computed. An algorithm that holds nothing else is private by construction.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from client.data.dataset import SiteData
from client.discrete_noise import Lattice
from client.grant import Grant
from client.optimizer import PatientDPOptimizer, draw_patients, os_generator
from client.patient_gradients import patient_gradients
from client.site import CHUNK_IMAGES
from common.algorithms.interface import ClassSums
from common.augment import augment, augment_with_masks
from common.episodes import Batch, Episode, MetaLoss, meta_gradients
from common.errors import UnchargedQuery
from common.learner import Learner
from common.models import HEAD, Network, parameters, refuse_batch_norm
from common.params import Params, zeros_like
from common.tasks import Task
from common.timing import timed

_TOGETHER = 64  # episodes in one vmap on a GPU: the bound of its memory


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """The public constants of a site's queries; noise std of a gradient query = noise_multiplier * clip / batch."""

    sample_rate: float  # q
    noise_multiplier: float  # z
    clip: float  # C
    batch: float  # B = q * declared N: a public constant, never a drawn or counted size
    max_images: int  # M per patient
    head_scale: float = 1.0  # the head's gradients are multiplied by it before clipping, divided after the noise
    feature_clip: float = 2.0  # R: the longest feature vector in a class sum
    episodes: int = 8  # m: a public constant, as are the modalities that the plan names
    modalities: int = 0
    views: int = 1
    discrete: bool = False  # exact noise on a lattice (client.discrete_noise) in place of normal numbers

    def lattice(self, *, sensitivity: float) -> Lattice | None:
        """Where contributions to a query of this sensitivity lie; None without discrete noise."""
        return Lattice(self.noise_multiplier * sensitivity) if self.discrete else None

    @timed("noise")
    def noise(self, shape: Sequence[int], *, sensitivity: float, generator: torch.Generator) -> Tensor:
        """float64 noise of std z * sensitivity."""
        if (lattice := self.lattice(sensitivity=sensitivity)) is not None:
            return lattice.sample(shape)
        std = self.noise_multiplier * sensitivity
        return torch.normal(0.0, std, tuple(shape), generator=generator, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class Unprotected:
    """Queries without clipping and noise, reproducible from `seed`: simulation of `privacy: none` only."""

    sample_rate: float
    max_images: int
    seed: int
    feature_clip: float = 2.0
    episodes: int = 8
    modalities: int = 0
    views: int = 1

    def lattice(self, *, sensitivity: float) -> None:
        """There is none."""


@dataclass(frozen=True)
class Seen:
    """Rows as the network takes them. Their views are drawn: to work through them again draws nothing."""

    inputs: Tensor
    targets: Tensor
    patient: Tensor  # int64 (n,): of each row

    def cut(self, at_once: int) -> list[Seen]:
        """Parts of at most so many rows, one patient with more of them by himself; at least one part, maybe empty."""
        _, owner, rows = torch.unique(self.patient, return_inverse=True, return_counts=True)
        if len(owner) <= at_once:
            return [self]
        part = torch.tensor(_filled(rows.tolist(), at_once))[owner]
        return [
            Seen(self.inputs[where], self.targets[where], self.patient[where])
            for where in (torch.nonzero(part == number).flatten() for number in part.unique())
        ]


class Patients:
    """A site's training images by patient, and the network through which queries see them.

    `chunk_images` and `bf16` are the site's own: how many rows go through the network at once, which bounds memory and
    changes no result, and whether convolutions and products are computed in bfloat16 (norms and sums never are).

    Raises ValueError for a network with BatchNorm.
    """

    def __init__(
        self,
        data: SiteData,
        network: Network,
        task: Task,
        *,
        device: str = "cpu",
        chunk_images: int = CHUNK_IMAGES,
        bf16: bool = False,
    ) -> None:
        refuse_batch_norm(network)
        self.public = parameters(network)  # on the CPU, where algorithms compute
        self.data, self.network, self.task, self.device = data, network.to(device), task, device
        self.chunk_images, self._bf16 = chunk_images, bf16
        order = torch.argsort(data.patients, stable=True)
        _, counts = torch.unique_consecutive(data.patients[order], return_counts=True)
        self.images_of = torch.split(order, counts.tolist())  # row numbers of each patient

    def batch(self, rows: Tensor, generator: torch.Generator, *, views: int = 1) -> tuple[Tensor, Tensor]:
        """Network inputs and targets on the device: with `views` above 1 so many random views of each row, view by
        view; then whatever the task makes of them."""
        if views > 1 and len(rows):
            inputs, targets = self._views(rows.repeat(views), generator)
        else:
            inputs, targets = self.data.inputs(rows), self.data.targets_at(rows)
        return self.task.views(inputs.to(self.device), targets.to(self.device), generator)

    def _views(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        images, targets = self.data.images[rows].float() / 255.0, self.data.targets_at(rows)
        if self.data.kind == "segmentation":
            images, targets = augment_with_masks(images, targets, generator)
        else:
            images = augment(images, generator)
        return self.data.as_inputs(images * 255.0, rows), targets

    def draw(self, *, sample_rate: float, max_images: int, generator: torch.Generator) -> list[Tensor]:
        """Row numbers of each patient who joined, at most `max_images` of each, drawn at random."""
        joined = draw_patients(len(self.images_of), sample_rate=sample_rate, generator=generator)
        return [_at_most(self.images_of[p], max_images, generator) for p in joined.tolist()]

    def chunks(self, drawn: list[Tensor], *, views: int = 1) -> list[tuple[Tensor, Tensor]]:
        """(row numbers, patient of each row) in physical batches cut between patients; at least one, maybe empty.

        Patients with equally many images come together: their gradients are computed side by side.
        """
        by_size = sorted(enumerate(drawn), key=lambda one: len(one[1]))
        chunks: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)
        for one, chunk in zip(
            by_size, _filled([views * len(rows) for _, rows in by_size], self.chunk_images), strict=True
        ):
            chunks[chunk].append(one)
        return [_stack(chunk) for chunk in chunks.values()] or [_stack([])]

    def outputs(self, inputs: Tensor) -> Tensor:
        """Float32, of the network as it stands."""
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self._bf16):
            outputs: Tensor = self.network(inputs)
        return outputs.float()

    def work_through(self, compute: Callable[[Seen, int], None], seen: Seen) -> None:
        """`compute` part by part, with the number of rows that it may take at once: half of it, and for good, where
        memory ran out. What was drawn stays drawn; `compute` must leave no trace of what it could not finish.
        """
        for part in seen.cut(self.chunk_images):
            try:
                compute(part, self.chunk_images)
                continue
            except RuntimeError as error:
                if len(part.inputs) < 2 or self.chunk_images < 2 or not _out_of_memory(error):
                    raise
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            self.chunk_images = min(self.chunk_images, len(part.inputs)) // 2
            self.work_through(compute, part)


def _filled(sizes: Sequence[int], limit: int) -> list[int]:
    """In which chunk each one goes, in order, so that none but a single one is above the limit."""
    chunk, filled, places = 0, 0, []
    for size in sizes:
        if filled and filled + size > limit:
            chunk, filled = chunk + 1, 0
        filled += size
        places.append(chunk)
    return places


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def _at_most(rows: Tensor, limit: int, generator: torch.Generator) -> Tensor:
    return rows if len(rows) <= limit else rows[torch.randperm(len(rows), generator=generator)[:limit]]


def _stack(chunk: list[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
    empty = torch.zeros(0, dtype=torch.int64)
    rows = torch.cat([empty, *(rows for _, rows in chunk)])
    patients = torch.cat([empty, *(torch.full((len(rows),), patient) for patient, rows in chunk)])
    return rows, patients


class PrivateDataset:
    """Private queries on one site's patients; see the module's docstring.

    `gradient`          Poisson-subsampled Gaussian, patient level, sensitivity C
    `episode_gradient`  the same over episodes, sensitivity 2 C
    `class_sums`        the same on bounded features by class, sensitivity 1
    `score`             the same on per-patient means in [0, 1]
    """

    def __init__(self, patients: Patients, mechanism: Mechanism | Unprotected, grant: Grant) -> None:
        self._patients, self._mechanism, self._grant = patients, mechanism, grant
        self._unprotected = torch.Generator()
        if isinstance(mechanism, Unprotected):
            self._unprotected.manual_seed(mechanism.seed)

    @property
    def learner(self) -> Learner:
        return Learner(self._patients.network, self._patients.task)

    @property
    def public(self) -> Params:
        return self._patients.public

    @timed("forward/backward")
    def gradient(self, params: Params, fixed: Params | None = None) -> Params:
        """Noisy mean over patients of the gradient of the task's loss at `params`; one entry per name.

        All other parameters of the network are as in `fixed`, and else as the study began.
        """
        with self._query(params, fixed):
            if isinstance(self._mechanism, Unprotected):
                return self._plain_gradient(params, self._mechanism)
            return self._private_gradient(params, self._mechanism)

    @timed("forward/backward")
    def episode_gradient(self, params: Params, meta_loss: MetaLoss, fixed: Params | None = None) -> Params:
        """Noisy mean over m episodes of the gradient of `meta_loss` at `params`; one entry per name.

        Every patient who joins picks one of the m episodes, and a side in it, independently of all others. All m
        episodes contribute, one that cannot be used contributes 0, and each is clipped to C. So a patient moves one
        episode from one clipped vector to another: sensitivity 2 C, noise std = 2 z C / m.
        """
        with self._query({}, None):
            generator = self._generator()
            episodes = self._episodes(generator)
            known = {name: value.to(self._patients.device) for name, value in params.items()}
            others = self.public | (fixed or {})
            gradients = meta_gradients(
                self.learner,
                known,
                {name: value.to(self._patients.device) for name, value in others.items() if name not in params},
                episodes,
                meta_loss,
                together=_TOGETHER if self._patients.device != "cpu" else 1,
            )
            if isinstance(self._mechanism, Unprotected):
                return _mean(gradients, params)
            return self._noisy_sum_of_episodes(gradients, params, self._mechanism, generator)

    @timed("forward/backward")
    def class_sums(self, params: Params) -> ClassSums:
        """Noisy sums over patients of the means of their images' features by class, divided by B.

        An image's vector is one-hot(label) x (f / R, 1) / sqrt(2) with f cut to norm R, so it has norm at most 1, and
        so has a patient's mean: sensitivity 1, noise std = z / B in these coordinates.
        """
        with self._query(params, None):
            generator = self._generator()
            drawn, sums = self._draw(generator), []
            data, device, radius = self._patients.data, self._patients.device, self._mechanism.feature_clip
            for rows, patient in self._patients.chunks(drawn):
                seen = Seen(data.inputs(rows).to(device), data.labels[rows], patient)
                self._patients.work_through(
                    lambda part, at_once: sums.append(self._class_vectors(part, at_once, radius)), seen
                )
            total = torch.stack(sums).sum(dim=0)
            noise = 0.0
            if isinstance(self._mechanism, Mechanism):
                noise = self._mechanism.noise_multiplier
                total = total + self._mechanism.noise(total.shape, sensitivity=1.0, generator=generator)
            batch = self._mechanism.batch if isinstance(self._mechanism, Mechanism) else max(1, len(drawn))
            scaled = (total * 2**0.5 / batch).float()
            return ClassSums(scaled[:, :-1] * radius, scaled[:, -1], noise * 2**0.5 * radius / batch)

    def score(self, params: Params) -> float:
        """Noisy mean over patients of the task's score in [0, 1] at `params`, clamped to [0, 1].

        Scores are centred at 1/2, so zeroing one patient moves the sum by at most 1/2: noise std = z / (2 B).
        """
        return float(self.statistic(params, self._patients.task.score)[0])

    @timed("forward/backward")
    def statistic(self, params: Params, fn: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Noisy mean over patients of fn(outputs, targets), (n,) or (n, k) in [0, 1], averaged inside the patient.

        Returns (k,) clamped to [0, 1]. Centred at 1/2 the sensitivity is sqrt(k)/2: noise std = z sqrt(k) / (2 B).
        """
        with self._query(params, None):
            generator = self._generator()
            drawn = self._draw(generator)
            sums: list[Tensor] = []
            for rows, patient in self._patients.chunks(drawn):
                inputs, targets = self._patients.batch(rows, generator)
                seen = Seen(inputs, targets, _repeated(patient, len(inputs)))
                self._patients.work_through(
                    lambda part, at_once: sums.append(self._centred_sum(part, at_once, fn)), seen
                )
            total = torch.stack(sums).sum(dim=0)
            if isinstance(self._mechanism, Unprotected):
                return (total / max(1, len(drawn)) + 0.5).float()
            radius = total.numel() ** 0.5 / 2
            noise = self._mechanism.noise(total.shape, sensitivity=radius, generator=generator)
            return ((total + noise) / self._mechanism.batch + 0.5).clamp(0.0, 1.0).float()

    @contextmanager
    def _query(self, params: Params, fixed: Params | None) -> Iterator[None]:
        """One unit of the grant, the network at `params`, and no buffer of it changed."""
        self._grant.use()
        network = self._patients.network
        _load(network, self.public | (fixed or {}), params)
        buffers = [buffer.clone() for buffer in network.buffers()]
        yield
        if any(not torch.equal(a, b) for a, b in zip(buffers, network.buffers(), strict=True)):
            raise UnchargedQuery("a buffer of the network changed during a query: it would carry data out")

    def _centred_sum(self, seen: Seen, at_once: int, fn: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Sum over patients of (mean over the patient's images - 1/2), each clipped to norm sqrt(k)/2; float64 (k,)."""
        values = fn(_forward(self._patients.network, seen.inputs, at_once), seen.targets).double().cpu()
        values = values.unsqueeze(1) if values.dim() == 1 else values
        radius = values.shape[1] ** 0.5 / 2
        return _sum_of_patients(values - 0.5, seen.patient, radius, self._mechanism.lattice(sensitivity=radius))

    def _class_vectors(self, seen: Seen, at_once: int, radius: float) -> Tensor:
        """Sum over patients of the means of their images' vectors, float64 (ways, F + 1); see `class_sums`."""
        ways = self._patients.data.ways
        features = _forward(self._patients.network.body, seen.inputs, at_once).double().cpu()
        lengths = features.norm(dim=1, keepdim=True)
        bounded = features / lengths.clamp(min=radius)
        vectors = torch.cat([bounded, torch.ones(len(features), 1, dtype=torch.float64)], dim=1) / 2**0.5
        of_class = one_hot(seen.targets, ways).double().unsqueeze(2) * vectors.unsqueeze(1)
        lattice = self._mechanism.lattice(sensitivity=1.0)
        return _sum_of_patients(of_class.flatten(1), seen.patient, 1.0, lattice).reshape(ways, -1)

    def _episodes(self, generator: torch.Generator) -> list[Episode]:
        """The episodes that have patients on both sides, of the m that were to be filled.

        Where the plan has M modalities, episode e is of modality e mod M: a patient brings the images of that one.
        """
        modalities, count = self._patients.data.modalities, self._mechanism.episodes
        sides: dict[tuple[int, bool], list[Tensor]] = defaultdict(list)
        for rows in self._draw(generator):
            episode = int(torch.randint(count, (), generator=generator))
            query = bool(torch.rand((), generator=generator) < 0.5)
            if modalities is not None and self._mechanism.modalities:
                rows = rows[modalities[rows] == episode % self._mechanism.modalities]
            if len(rows):
                sides[episode, query].append(rows)
        usable = [n for n in range(count) if (n, False) in sides and (n, True) in sides]
        return [Episode(*(self._side(sides[n, query], generator) for query in (False, True))) for n in usable]

    def _side(self, drawn: list[Tensor], generator: torch.Generator) -> Batch:
        """The patients' images as a batch in which all patients count alike."""
        rows, patient = _stack(list(enumerate(drawn)))
        inputs, targets = self._patients.batch(rows, generator, views=self._mechanism.views)
        weights = 1.0 / torch.bincount(patient)[_repeated(patient, len(inputs))]
        return Batch(inputs, targets, weights.to(inputs))

    def _noisy_sum_of_episodes(
        self, gradients: Iterator[Params], params: Params, mechanism: Mechanism, generator: torch.Generator
    ) -> Params:
        factors = {name: mechanism.head_scale if name.startswith(HEAD) else 1.0 for name in params}
        total = {name: value.double() for name, value in zeros_like(params).items()}
        sensitivity = 2 * mechanism.clip
        lattice = mechanism.lattice(sensitivity=sensitivity)
        for gradient in gradients:
            scaled = {name: factors[name] * value.double().cpu() for name, value in gradient.items()}
            clipped = clip_to(scaled, mechanism.clip, lattice)
            total = {name: value + clipped[name] for name, value in total.items()}
        noisy = {
            name: value + mechanism.noise(value.shape, sensitivity=sensitivity, generator=generator)
            for name, value in total.items()
        }
        return {name: (value / (factors[name] * mechanism.episodes)).float() for name, value in noisy.items()}

    def _generator(self) -> torch.Generator:
        return self._unprotected if isinstance(self._mechanism, Unprotected) else os_generator()

    def _draw(self, generator: torch.Generator) -> list[Tensor]:
        mechanism = self._mechanism
        return self._patients.draw(
            sample_rate=mechanism.sample_rate, max_images=mechanism.max_images, generator=generator
        )

    def _private_gradient(self, params: Params, mechanism: Mechanism) -> Params:
        generator, network = os_generator(), self._patients.network
        trained = {name: value for name, value in network.named_parameters() if value.requires_grad}
        optimizer = PatientDPOptimizer(
            trained.values(),
            scales=[mechanism.head_scale if name.startswith(HEAD) else 1.0 for name in trained],
            noise_multiplier=mechanism.noise_multiplier,
            max_grad_norm=mechanism.clip,
            expected_batch_size=mechanism.batch,
            generator=generator,
            discrete=mechanism.discrete,
        )

        def add(seen: Seen, at_once: int) -> None:
            optimizer.group(seen.patient)
            found = patient_gradients(
                self._patients.outputs,
                network,
                self._patients.task.loss,
                seen.inputs,
                seen.targets,
                optimizer.patients,
                at_once=at_once,
                written=mechanism.discrete,
            )
            optimizer.accumulate(*found)

        for chunk in self._patients.chunks(self._draw(generator), views=mechanism.views):
            self._patients.work_through(add, self._seen(*chunk, generator))
        released = dict(zip(trained, optimizer.release(), strict=True))
        return {name: released[name].cpu() for name in params}

    def _plain_gradient(self, params: Params, mechanism: Unprotected) -> Params:
        drawn = self._draw(self._generator())
        network = self._patients.network
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        network.zero_grad()

        def add(seen: Seen, at_once: int) -> None:
            views = torch.bincount(seen.patient)[seen.patient].float()
            weights = (1.0 / (views * max(1, len(drawn)))).to(self._patients.device)
            sums = [torch.zeros_like(parameter) for parameter in trained]
            for inputs, targets, weight in zip(
                *(x.split(at_once) for x in (seen.inputs, seen.targets, weights)), strict=True
            ):
                loss = (self._patients.task.loss(self._patients.outputs(inputs), targets) * weight).sum()
                gradients = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
                sums = [a.add_(b) for a, b in zip(sums, gradients, strict=True)]
            for parameter, gradient in zip(trained, sums, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

        for chunk in self._patients.chunks(drawn, views=mechanism.views):
            self._patients.work_through(add, self._seen(*chunk, self._generator()))
        return _gradients(network, params)

    def _seen(self, rows: Tensor, patient: Tensor, generator: torch.Generator) -> Seen:
        inputs, targets = self._patients.batch(rows, generator, views=self._mechanism.views)
        return Seen(inputs, targets, _repeated(patient, len(inputs)))


@torch.no_grad()
def _forward(network: nn.Module, inputs: Tensor, at_once: int) -> Tensor:
    return torch.cat([network(some) for some in inputs.split(at_once)])


@timed("clip")
def clip_to(params: Params, limit: float, lattice: Lattice | None = None) -> Params:
    """`params` (float64) cut to norm `limit` over all names together, and on the lattice if there is one; all zero if
    any number is not finite."""
    norm = sum(float(value.square().sum()) for value in params.values()) ** 0.5
    if not math.isfinite(norm):
        return zeros_like(params)
    if lattice is not None:
        limit = lattice.bound(limit, sum(value.numel() for value in params.values()))
    factor = min(1.0, limit / norm) if norm else 1.0
    clipped = {name: value * factor for name, value in params.items()}
    return clipped if lattice is None else {name: lattice.rounded(value) for name, value in clipped.items()}


@timed("clip")
def _sum_of_patients(values: Tensor, patient: Tensor, radius: float, lattice: Lattice | None = None) -> Tensor:
    """Sum over patients of the mean of their rows of `values` (n, k), each cut to norm `radius` and on the lattice if
    there is one; one that is not finite adds 0. float64 (k,)."""
    _, index, rows = torch.unique(patient, return_inverse=True, return_counts=True)
    means = torch.zeros(len(rows), values.shape[1], dtype=torch.float64).index_add_(0, index, values)
    means = means / rows.reshape(-1, 1)
    norms = means.norm(dim=1, keepdim=True)
    limit = radius if lattice is None else lattice.bound(radius, values.shape[1])
    clipped = means * (limit / norms.clamp(min=limit))
    if lattice is not None:
        clipped = lattice.rounded(clipped)
    return torch.where(torch.isfinite(norms), clipped, torch.zeros_like(means)).sum(dim=0)


def _repeated(patient: Tensor, rows: int) -> Tensor:
    """The patient of each of `rows` views, which stand view by view."""
    return patient.repeat(rows // max(1, len(patient)))


def _mean(gradients: Iterator[Params], params: Params) -> Params:
    """The plain mean; zero of none."""
    total, count = zeros_like(params), 0
    for gradient in gradients:
        total, count = {name: value + gradient[name].cpu() for name, value in total.items()}, count + 1
    return {name: value / max(1, count) for name, value in total.items()}


def _load(network: nn.Module, others: Params, params: Params) -> None:
    """Put `params` into the network and let exactly these be trained; all its other parameters are as in `others`."""
    known = dict(network.named_parameters())
    if unknown := params.keys() - known.keys():
        raise ValueError(f"the network has no parameters {sorted(unknown)}")
    network.train()
    values = others | params
    with torch.no_grad():
        for name, parameter in known.items():
            parameter.requires_grad_(name in params)
            parameter.copy_(values[name])


def _gradients(network: nn.Module, params: Params) -> Params:
    """The finished gradients on the CPU; nothing of this query stays in the network."""
    gradients: Params = {}
    for name, parameter in network.named_parameters():
        if name in params and parameter.grad is not None:
            gradients[name] = parameter.grad.detach().cpu().clone()
        parameter.grad = None
    return gradients
