"""CutPaste (Li et al. 2021, arXiv:2104.04015): a patch of an image, pasted elsewhere in it, is an anomaly for free.

A network that tells pasted from clean images of healthy organs learns what breaks an image's own regularity, without
a single diseased example.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_AREA = (0.02, 0.15)  # of the image
_ASPECT = 3.0  # at most, either way
_BRIGHTNESS = 0.4  # at most; in units of the normalised image


def cut_paste(images: Tensor, rng: torch.Generator) -> Tensor:
    """Images (n, C, H, W), each with one of its rectangles copied to another place and made a little brighter or
    darker."""
    pasted = images.clone()
    height, width = images.shape[2:]
    for number in range(len(images)):
        area, aspect, *places, light = torch.rand(7, generator=rng).tolist()
        share = _AREA[0] + area * (_AREA[1] - _AREA[0])
        stretch = math.exp((2 * aspect - 1) * math.log(_ASPECT) / 2)
        h = _side(height, math.sqrt(share) * stretch)
        w = _side(width, math.sqrt(share) / stretch)
        top, left, to_top, to_left = (
            int(place * (size + 1))
            for place, size in zip(places, (height - h, width - w, height - h, width - w), strict=True)
        )
        patch = images[number, :, top : top + h, left : left + w]
        pasted[number, :, to_top : to_top + h, to_left : to_left + w] = patch + (2 * light - 1) * _BRIGHTNESS
    return pasted


def _side(whole: int, share: float) -> int:
    return min(whole, max(1, round(whole * share)))
