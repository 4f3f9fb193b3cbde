"""The patient-level Gaussian mechanism on Opacus.

One step, S = patients who joined (each independently with probability q), at most M images each:

    g_p = mean over the patient's images of grad loss
    G   = (1/B) * ( sum_{p in S} g_p * min(1, C/||g_p||)  +  Normal(0, (z C)^2 I) ),    B = q * declared N

`client.patient_gradients` computes the patients' gradients; this file clips, sums and adds the noise.

Coordinates may be scaled before clipping and scaled back after the noise: the mechanism is the same, applied to a
linear change of variables, and scaling back is post-processing. It says how the clip is shared between the head, whose
gradients are large, and the body.
"""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from opacus.optimizers.optimizer import DPOptimizer
from torch import Tensor, nn

from client.discrete_noise import Lattice
from client.patient_gradients import Grouping, Share, Shares, Written
from common.timing import timed

_MARGIN = 1e-6  # relative; keeps a clipped float32 gradient at or below C
_SMALL = 10_000  # numbers of a parameter up to which it is worked on together with others
_MERSENNE_WORDS = 624


def os_generator() -> torch.Generator:
    """A CPU generator whose whole Mersenne state (19 968 bits) comes from the operating system.

    Never the experiment seed and never torch's global state: two sites that share a seed would cancel each
    other's noise exactly. Not `manual_seed` either, which keeps 32 bits of its argument on a CPU: whoever holds a
    release could try all 2^32 noises. Made anew for every query, so that a forked process repeats none.
    """
    generator = torch.Generator()
    words = np.frombuffer(secrets.token_bytes(4 * _MERSENNE_WORDS), dtype="<u4").astype("<u8").tobytes()
    state = generator.get_state().numpy().tobytes()
    header = np.array([0], "<u8").tobytes() + np.array([1, 1], "<i4").tobytes() + np.array([0], "<u8").tobytes()
    fresh = header + words + bytes(len(state) - len(header) - len(words))
    generator.set_state(torch.frombuffer(bytearray(fresh), dtype=torch.uint8))
    return generator


def draw_patients(patients: int, *, sample_rate: float, generator: torch.Generator) -> Tensor:
    """Poisson sampling: int64 numbers of those of `patients` who joined. Coins are float64."""
    coins = torch.rand(patients, dtype=torch.float64, generator=generator)
    return torch.nonzero(coins < sample_rate).flatten()


class _Trained(torch.optim.Optimizer):
    """Names the parameters, and makes no step. Optimizer's own start would load torch's compiler: a second and a half
    of every process that asks a query."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.param_groups = [{"params": list(parameters)}]


class PatientDPOptimizer(DPOptimizer):
    """Opacus' DPOptimizer with the patient as its privacy unit.

    Call `group(patients)` before every physical batch: `patients[i]` is the patient of its row i, and a patient's rows
    must all be in one batch. Then `accumulate` with what `patient_gradients` finds for `self.patients`; after the last
    batch `release`. `scales` has a public factor for each parameter, in their order. `discrete`: contributions are
    rounded to a lattice, and the noise is discrete (`client.discrete_noise`).
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, scales: Sequence[float], discrete: bool = False, **arguments: Any
    ) -> None:
        super().__init__(_Trained(parameters), **arguments)
        self._patients: Tensor | None = None
        self._scales, self._discrete = tuple(scales), discrete

    @property
    def _lattice(self) -> Lattice | None:
        return Lattice(self.noise_multiplier * self.max_grad_norm) if self._discrete else None

    @property
    def _trained(self) -> list[Any]:
        """The parameters, to which Opacus adds `grad_sample` and `summed_grad`."""
        return list(self.params)

    def group(self, patients: Tensor) -> None:
        """State the patient of each row (int64, (n,)) of the next physical batch."""
        self._patients = patients

    @property
    def patients(self) -> Tensor:
        """Of each row of the physical batch. Raises RuntimeError if `group` was not called for it."""
        if self._patients is None:
            raise RuntimeError("every step needs the patient of each row: call group(patients) first")
        return self._patients

    def accumulate(self, groups: Grouping, shares: Shares) -> None:
        """Add this physical batch's clipped patients to `summed_grad`: all of it, or nothing if an error is raised."""
        self._groups, self._patients = groups, None
        for parameter in self._trained:
            parameter.grad_sample = shares[parameter]
        try:
            self.clip_and_accumulate()
        finally:
            for parameter in self._trained:
                parameter.grad_sample = None

    def release(self) -> list[Tensor]:
        """The noisy mean, parameter by parameter; nothing of it stays."""
        self.add_noise()
        released = []
        for parameter in self._trained:
            released.append(parameter.grad.detach() / self.expected_batch_size)
            parameter.grad = parameter.summed_grad = None
        return released

    @timed("clip")
    def clip_and_accumulate(self) -> None:
        """Clip each patient's mean to max_grad_norm over all parameters together, add to `summed_grad`.

        A patient with a non-finite gradient contributes zero: a NaN that reached the release would reveal that
        the patient joined.
        """
        bundles = list(self._bundles())
        squares = torch.zeros(self._groups.patients, dtype=torch.float64)
        for scale, _, shares in bundles:
            if shares:
                squares += scale**2 * torch.cat([share.squares() for share in shares])
        norms = squares.sqrt()
        limit, lattice = self.max_grad_norm, self._lattice
        if lattice is not None:
            limit = lattice.bound(limit, sum(parameter.numel() for parameter in self._trained))
        factors = (limit / (norms * (1 + _MARGIN) + 1e-30)).clamp(max=1.0)
        factors = torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))
        sums = [_sum(parameters, shares, scale * factors, lattice) for scale, parameters, shares in bundles]
        for (_, parameters, _), total in zip(bundles, sums, strict=True):
            for parameter, own in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
                before, own = parameter.summed_grad, own.reshape(parameter.shape)
                parameter.summed_grad = own if before is None else before.add_(own)

    def _bundles(self) -> Iterator[tuple[float, list[Any], list[Share]]]:
        """(scale, parameters, their shares): many small calls would cost more than the numbers in them, so small
        gradients lie side by side."""
        small: dict[float, list[Any]] = defaultdict(list)
        for scale, parameter in zip(self._scales, self._trained, strict=True):
            shares = parameter.grad_sample
            if parameter.numel() <= _SMALL and len(shares) == 1 and isinstance(shares[0], Written):
                small[scale].append(parameter)
            else:
                yield scale, [parameter], shares
        for scale, parameters in small.items():
            gradients = [parameter.grad_sample[0].values.flatten(1) for parameter in parameters]
            yield scale, parameters, [Written(torch.cat(gradients, dim=1))]

    @timed("noise")
    def add_noise(self) -> None:
        """`p.grad` = (clipped sum + Normal(0, (z C)^2 I)) / scale; noise is drawn on the CPU on every device."""
        std, lattice = self.noise_multiplier * self.max_grad_norm, self._lattice
        for parameter, factor, noise in zip(self._trained, self._scales, self._noise(std, lattice), strict=True):
            total: Tensor = parameter.summed_grad
            parameter.grad = total.add_(noise.view_as(total).to(total)).div_(factor).to(parameter)

    def _noise(self, std: float, lattice: Lattice | None) -> Iterator[Tensor]:
        """For each parameter, flat; one draw for all small ones."""

        def draw(count: int) -> Tensor:
            if lattice is None:
                return torch.normal(0.0, std, (count,), generator=self.generator)
            return lattice.sample((count,))

        sizes = [parameter.numel() for parameter in self._trained]
        small = [size for size in sizes if size <= _SMALL]
        of_small = iter(draw(sum(small)).split(small))
        return (next(of_small) if size <= _SMALL else draw(size) for size in sizes)


def _sum(parameters: list[Any], shares: list[Any], factors: Tensor, lattice: Lattice | None) -> Tensor:
    """Over patients, each times its factor, flat; only written-out gradients go on a lattice."""
    if not shares:  # where no gradient reaches
        exact = torch.float32 if lattice is None else torch.float64
        return torch.cat([torch.zeros_like(parameter, dtype=exact).flatten() for parameter in parameters])
    owners = factors.split([share.patients for share in shares])
    sums = (
        share.sum(own) if lattice is None else lattice.rounded(share.each(own)).sum(dim=0)
        for share, own in zip(shares, owners, strict=True)
    )
    total = next(sums)
    for other in sums:
        total.add_(other)
    return total.flatten()
