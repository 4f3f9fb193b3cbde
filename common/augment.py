"""Random views of an image: small turns, shifts and zooms, and the differences between scanners.

No flips where an image has an up and a left: laterality is a label (a heart on the right, a left kidney). No crops that
could lose the lesion.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

_TURN_DEGREES, _ZOOM, _SHIFT = 15.0, 0.15, 0.1  # at most; shift as a share of the image
_GAMMA, _CONTRAST, _BRIGHTNESS, _NOISE = 0.4, 0.3, 0.1, 0.05  # at most; gamma and contrast in log scale
_INVERTED, _BLURRED = 0.2, 0.3  # shares of the images (MONOCHROME1 beside MONOCHROME2; soft kernels)


def augment(images: Tensor, rng: torch.Generator, *, free: Tensor | None = None) -> Tensor:
    """One random view of each image: float (B, C, H, W) in [0, 1] to the same.

    `free` (bool, (B,)) marks images without an up or a left, as slides under a microscope: those are also flipped and
    turned by quarters.
    """
    lain = images if free is None else _free_orientation(images, free, rng)
    return _photometric(_moved(lain, _grid(lain, rng)), rng).clamp(0.0, 1.0)


def augment_with_masks(
    images: Tensor, masks: Tensor, rng: torch.Generator, *, free: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same, with masks int64 (B, H, W) that move as their images do."""
    both = torch.cat([images, masks.unsqueeze(1).to(images)], dim=1)
    lain = both if free is None else _free_orientation(both, free, rng)
    grid = _grid(lain, rng)
    kept = _moved(lain[:, -1:], grid, mode="nearest")
    return _photometric(_moved(lain[:, :-1], grid), rng).clamp(0.0, 1.0), kept.squeeze(1).long()


def _free_orientation(images: Tensor, free: Tensor, rng: torch.Generator) -> Tensor:
    """Each of `free` images in one of the eight ways in which a square can lie."""
    lies = free.reshape(-1, 1, 1, 1)
    images = torch.where(lies & _coin(rng, len(images), 0.5), images.flip(3), images)
    images = torch.where(lies & _coin(rng, len(images), 0.5), images.flip(2), images)
    return torch.where(lies & _coin(rng, len(images), 0.5), images.transpose(2, 3), images)


def _grid(images: Tensor, rng: torch.Generator) -> Tensor:
    """Where each pixel of a turned, shifted and zoomed view comes from; (B, H, W, 2)."""
    count = len(images)
    angle = _between(rng, count) * math.radians(_TURN_DEGREES)
    zoom = torch.exp(_between(rng, count) * _ZOOM)
    turn = torch.stack([zoom * angle.cos(), -zoom * angle.sin(), zoom * angle.sin(), zoom * angle.cos()], dim=1)
    shift = _between(rng, count, 2) * 2 * _SHIFT  # the grid spans [-1, 1]
    affine = torch.cat([turn.reshape(-1, 2, 2), shift.unsqueeze(2)], dim=2)
    return functional.affine_grid(affine, list(images.shape), align_corners=False)


def _moved(images: Tensor, grid: Tensor, mode: str = "bilinear") -> Tensor:
    return functional.grid_sample(images, grid, mode=mode, padding_mode="reflection", align_corners=False)


def _photometric(images: Tensor, rng: torch.Generator) -> Tensor:
    count = len(images)

    def each(scale: float) -> Tensor:
        return _between(rng, count, 1, 1, 1) * scale

    images = images.clamp(1e-3, 1.0) ** each(_GAMMA).exp()
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = (images - mean) * each(_CONTRAST).exp() + mean + each(_BRIGHTNESS)
    images = torch.where(_coin(rng, count, _INVERTED), 1.0 - images, images)
    blurred = functional.avg_pool2d(functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = torch.where(_coin(rng, count, _BLURRED), blurred, images)
    return images + torch.randn(images.shape, generator=rng) * each(_NOISE).abs()


def _between(rng: torch.Generator, *shape: int) -> Tensor:
    """Uniform in [-1, 1)."""
    return torch.rand(shape, generator=rng) * 2 - 1


def _coin(rng: torch.Generator, count: int, probability: float) -> Tensor:
    return torch.rand((count, 1, 1, 1), generator=rng) < probability
