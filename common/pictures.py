"""Images for pages: with the contour of a mask, with what a network found in them, or with a heat map over them.

All take uint8 images (H, W) or (H, W, 3) and give uint8 (k H, k W, 3): pixels are repeated, so that a contour can be
thinner than one of them.
"""

from __future__ import annotations

import base64
import io

import numpy as np

# Okabe-Ito: apart in hue and in lightness by all forms of colour blindness
COLOURS = {"found and true": (86, 180, 233), "found wrongly": (213, 94, 0), "missed": (240, 228, 66)}
_OUTLINE = (0, 230, 230)
_LEAST_SIDE = 192  # pixels
_FILL = 0.6  # how much of a marked pixel is colour
_HEAT = 0.85  # the same, where heat is 1


def outlined(image: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """The image with the contour of each class of `mask` (uint8 (H, W), 0 is background); as it is without a mask."""
    enlarged = _enlarged(_coloured(image))
    if mask is not None:
        enlarged[_edges(_enlarged(mask))] = _OUTLINE
    return enlarged


def agreement(image: np.ndarray, truth: np.ndarray, found: np.ndarray) -> np.ndarray:
    """The image with what was found and is true, found wrongly, and missed, in `COLOURS`; masks uint8 (H, W).

    A pixel that was given another class than the true one was found wrongly.
    """
    painted = _coloured(image).astype(np.float64)
    areas = (found > 0) & (found == truth), (found > 0) & (found != truth), (found == 0) & (truth > 0)
    for colour, area in zip(COLOURS.values(), areas, strict=True):
        painted[area] = (1 - _FILL) * painted[area] + _FILL * np.array(colour)
    return _enlarged(painted.round().astype(np.uint8))


def heated(image: np.ndarray, heat: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """The image under a heat map (float (H, W) in [0, 1]), and the contour of `mask` over both."""
    from matplotlib import colormaps

    share = _HEAT * heat[..., None]
    glow = colormaps["inferno"](heat)[..., :3] * 255
    return outlined(((1 - share) * _coloured(image) + share * glow).round().astype(np.uint8), mask)


def png_address(image: np.ndarray) -> str:
    """uint8 (H, W) or (H, W, 3) as a data address."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _coloured(image: np.ndarray) -> np.ndarray:
    return np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image


def _enlarged(values: np.ndarray) -> np.ndarray:
    times = -(-_LEAST_SIDE // values.shape[0])
    return values.repeat(times, axis=0).repeat(times, axis=1)


def _edges(mask: np.ndarray) -> np.ndarray:
    """Where a class borders another, on the inside of the higher one: bool (H, W)."""
    framed = np.pad(mask, 1)  # an area that the image cuts off is closed along its border
    neighbours = (framed[:-2, 1:-1], framed[2:, 1:-1], framed[1:-1, :-2], framed[1:-1, 2:])
    inside: np.ndarray = np.logical_or.reduce([mask > other for other in neighbours])
    return inside
