"""Images for pages: with the contour of a mask, with what a network found in them, or with a heat map over them.

All take uint8 images (H, W) or (H, W, 3) and give uint8 (k H, k W, 3): pixels are repeated, so that a contour can be
thinner than one of them.
"""

from __future__ import annotations

import base64
import io
from functools import cache

import numpy as np

# Okabe-Ito: apart in hue and in lightness by all forms of colour blindness
COLOURS = {"found and true": (86, 180, 233), "found wrongly": (213, 94, 0), "missed": (240, 228, 66)}
CONTOURS = ((86, 180, 233), (230, 159, 0), (0, 158, 115), (240, 228, 66), (204, 121, 167), (213, 94, 0))  # of classes
_OUTLINE = (0, 230, 230)
_LEAST_SIDE = 192  # pixels
_FILL = 0.6  # how much of a marked pixel is colour
_HEAT = 0.65  # the same, where heat is 1: what lies below can still be seen


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
    return outlined(glowing(image, heat), mask)


def glowing(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3): the image under a heat map (float (H, W) in [0, 1]), in its own size."""
    from PIL import Image

    glow = Image.fromarray(np.minimum(heat * 256, 255).astype(np.uint8))
    glow.putpalette(_inferno())
    share = Image.fromarray((255 * _HEAT * heat).round().astype(np.uint8))
    return np.asarray(Image.composite(glow.convert("RGB"), Image.fromarray(_coloured(image)), share))


@cache
def _inferno() -> bytes:
    """256 colours, RGB; lightness rises evenly, for all forms of colour blindness."""
    from matplotlib import colormaps

    colours: np.ndarray = (colormaps["inferno"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
    return colours.tobytes()


def contoured(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3): the image, in its own size, with contours three pixels wide, each class 1, 2, ... of `mask`
    (uint8 (H, W)) in its colour of `CONTOURS`."""
    painted = _coloured(image).copy()
    for value in np.unique(mask[mask > 0]).tolist():
        inside = (mask == value).astype(np.uint8)
        wide = _edges(inside)
        for _ in range(2):
            inside = inside * ~wide
            wide |= _edges(inside)
        painted[wide] = CONTOURS[(value - 1) % len(CONTOURS)]
    return painted


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
