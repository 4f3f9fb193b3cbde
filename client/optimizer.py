"""The patient-level Gaussian mechanism on Opacus.

One step, S = patients who joined (each independently with probability q), at most M images each:

    g_p = mean over the patient's images of grad loss
    G   = (1/B) * ( sum_{p in S} g_p * min(1, C/||g_p||)  +  Normal(0, (z C)^2 I) ),    B = q * declared N

Opacus computes the per-image gradients; this file makes the patient the unit.

Coordinates may be scaled before clipping and scaled back after the noise: the mechanism is the same, applied to a
linear change of variables, and scaling back is post-processing. It says how the clip is shared between the head, whose
gradients are large, and the body.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from opacus.optimizers.optimizer import DPOptimizer
from torch import Tensor

from client.discrete_noise import Lattice
from common.timing import timed

_MARGIN = 1e-6  # relative; keeps a clipped float32 gradient at or below C


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


class PatientDPOptimizer(DPOptimizer):
    """Opacus' DPOptimizer with the patient as its privacy unit.

    Call `group(patients)` before every step: `patients[i]` is the patient of row i of the per-image gradients. A
    patient's rows must all be in one physical batch. Stepping without it is refused, for Opacus would clip per image.
    `scales` has a public factor for each parameter, in the optimizer's order. `discrete`: contributions are rounded to
    a lattice, and the noise is discrete (`client.discrete_noise`).
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, scales: Sequence[float], discrete: bool = False, **arguments: Any
    ) -> None:
        super().__init__(optimizer, **arguments)
        self._patients: Tensor | None = None
        self._scales, self._discrete = tuple(scales), discrete

    @property
    def _lattice(self) -> Lattice | None:
        return Lattice(self.noise_multiplier * self.max_grad_norm) if self._discrete else None

    @timed("noise")
    def add_noise(self) -> None:
        """`p.grad` = (clipped sum + Normal(0, (z C)^2 I)) / scale; noise is drawn on the CPU on every device."""
        std, lattice = self.noise_multiplier * self.max_grad_norm, self._lattice
        for parameter, factor in zip(self.params, self._scales, strict=True):
            total: Tensor = parameter.summed_grad  # type: ignore[attr-defined]  # Opacus adds the attribute
            if lattice is None:
                noise = torch.normal(0.0, std, parameter.shape, generator=self.generator)
            else:
                noise = lattice.sample(parameter.shape)
            parameter.grad = ((total + noise.to(total)) / factor).to(parameter)

    def group(self, patients: Tensor) -> None:
        """State the patient of each row (int64, (n,)) of the next physical batch."""
        self._patients = patients

    @timed("clip")
    def clip_and_accumulate(self) -> None:
        """Mean per patient, clip to max_grad_norm over all parameters together, add to `summed_grad`.

        A patient with a non-finite gradient contributes zero: a NaN that reached the release would reveal that
        the patient joined.

        Raises RuntimeError if `group` was not called for this batch or does not fit it.
        """
        rows = self.grad_samples
        if self._patients is None or len(self._patients) != len(rows[0]):
            raise RuntimeError("every step needs the patient of each row: call group(patients) first")
        _, patient, images = torch.unique(self._patients, return_inverse=True, return_counts=True)
        self._patients = None
        means = [
            factor * _mean_per_patient(gradient, patient, images)
            for factor, gradient in zip(self._scales, rows, strict=True)
        ]
        squares = torch.zeros(len(images), dtype=torch.float64)
        for mean in means:
            squares += mean.flatten(1).double().square().sum(dim=1).cpu()
        norms = squares.sqrt()
        finite = torch.isfinite(norms)
        limit, lattice = self.max_grad_norm, self._lattice
        if lattice is not None:
            limit = lattice.bound(limit, sum(mean[0].numel() for mean in means) if len(images) else 0)
        factor = (limit / (norms * (1 + _MARGIN) + 1e-30)).clamp(max=1.0)
        factor = torch.where(finite, factor, torch.zeros_like(factor))
        for parameter, mean in zip(self.params, means, strict=True):
            mask = finite.to(mean.device).reshape(-1, *[1] * (mean.dim() - 1))
            safe = torch.where(mask, mean, torch.zeros_like(mean))
            if lattice is None:
                clipped = torch.einsum("i,i...", factor.to(safe), safe)
            else:
                each = torch.einsum("i,i...->i...", factor.to(safe.device), safe.double())
                clipped = lattice.rounded(each).sum(dim=0)
            before: Tensor | None = parameter.summed_grad  # type: ignore[attr-defined]
            parameter.summed_grad = clipped if before is None else before + clipped  # type: ignore[attr-defined]


def _mean_per_patient(gradient: Tensor, patient: Tensor, images: Tensor) -> Tensor:
    """(n, ...) per-image gradients -> (patients, ...) means, summed in float32."""
    gradient = gradient.float()
    total = torch.zeros(len(images), *gradient.shape[1:], device=gradient.device)
    total.index_add_(0, patient.to(gradient.device), gradient)
    return total / images.to(total).reshape(-1, *[1] * (total.dim() - 1))
