"""Gradient inversion: the images that a hospital's one-step update came from.

The lab knows the parameters, the labels and how many images there are, and looks for images whose gradient points where
the update points (Geiping 2020, arXiv:2003.14053):

    x = argmin 1 - cos(grad L(theta; x), g) + t TV(x),    signed Adam steps, several starts and t

Pixels are in [0, 1]. A network that standardises its input cannot tell brightness and contrast of an image from its
gradient, so likeness is measured after the change of both that fits the original best. What is reported is the best of
all tries by the original itself, which the lab could not know: an upper bound for this attack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.images import normalise
from common.params import Params

Gradient = Callable[[Tensor], Params]  # of network inputs (n, C, H, W); differentiable in them

_RATE = 0.1  # of Adam, in pixels
_DROPS = (3 / 8, 5 / 8, 7 / 8)  # of the steps, after which the rate falls to a tenth


@dataclass(frozen=True)
class Likeness:
    """How near a picture is to the original, brightness and contrast aside."""

    psnr: float  # dB
    ssim: float


def invert(
    gradient: Gradient,
    target: Params,
    shape: Sequence[int],
    *,
    steps: int,
    smoothness: Sequence[float],
    rng: torch.Generator,
) -> list[Tensor]:
    """One picture (n, C, H, W) in [0, 1] for every value of `smoothness` (t), each from a random start."""
    return [_descended(gradient, target, torch.rand(*shape, generator=rng), steps, t) for t in smoothness]


def _descended(gradient: Gradient, target: Params, start: Tensor, steps: int, smoothness: float) -> Tensor:
    picture = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([picture], lr=_RATE)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(share * steps) for share in _DROPS])
    for _ in range(steps):
        optimizer.zero_grad()
        objective = _angle(gradient(normalise(255.0 * picture)), target) + smoothness * _variation(picture)
        (picture.grad,) = torch.autograd.grad(objective, [picture])
        picture.grad.sign_()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            picture.clamp_(0.0, 1.0)
    return picture.detach()


def _angle(found: Params, target: Params) -> Tensor:
    """1 - cosine over all names together."""
    inner = sum((found[name] * value).sum() for name, value in target.items())
    lengths = [sum(side[name].square().sum() for name in target) for side in (found, target)]
    return 1.0 - inner / (lengths[0] * lengths[1]).clamp(min=1e-30).sqrt()


def _variation(picture: Tensor) -> Tensor:
    """Mean absolute difference of neighbours."""
    return picture.diff(dim=2).abs().mean() + picture.diff(dim=3).abs().mean()


def best(pictures: Sequence[Tensor], original: Tensor) -> Tensor:
    """Of several (C, H, W) the one most like the original, brought to its brightness and contrast."""
    return max((fitted(picture, original) for picture in pictures), key=lambda one: likeness(one, original).psnr)


def fitted(picture: Tensor, original: Tensor) -> Tensor:
    """a * picture + b with the a >= 0 and b nearest the original in the mean square, cut to [0, 1]."""
    centred, truth = picture - picture.mean(), original - original.mean()
    slope = ((centred * truth).sum() / centred.square().sum().clamp(min=1e-12)).clamp(min=0.0)
    return (slope * centred + original.mean()).clamp(0.0, 1.0)


def likeness(picture: Tensor, original: Tensor) -> Likeness:
    """Of pictures (C, H, W) in [0, 1] as they stand."""
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    error = float((picture - original).square().mean())
    found = ssim(picture.unsqueeze(0), original.unsqueeze(0), data_range=1.0)
    return Likeness(-10 * torch.log10(torch.tensor(max(error, 1e-10))).item(), float(found))
