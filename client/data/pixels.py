"""From a scanner's values to what a screen would show: windows and the usual view of the body."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from client.data.readers import MOST_PIXELS, UnreadableImageError

_TAILS = (0.5, 99.5)  # percent: what a window without a scanner's own leaves to black and white
_AXES = {"L": "x", "R": "x", "P": "y", "A": "y", "H": "z", "F": "z"}
_USUAL = {"x": "L", "y": "P", "z": "F"}  # patient's left on the right; back, or feet, below


@dataclass(frozen=True)
class Window:
    """Centre and width, in the scanner's units, and how grey rises between (PS3.3 C.11.2.1.2)."""

    centre: float
    width: float
    shape: str = "LINEAR"  # LINEAR_EXACT, SIGMOID


def windowed(values: np.ndarray, window: Window) -> np.ndarray:
    """uint8, 0 below the window and 255 above it.

    Raises UnreadableImageError if a value is NaN or infinite.
    """
    wide = values.astype(np.float64)
    if not np.isfinite(wide).all():
        raise UnreadableImageError("a pixel is NaN or infinite")
    centre, width = window.centre, window.width
    if window.shape == "SIGMOID":
        share = 1 / (1 + np.exp(np.clip(-4 * (wide - centre) / width, -500, 500)))
    elif window.shape == "LINEAR_EXACT":
        share = (wide - centre) / width + 0.5
    elif width == 1:  # a threshold
        share = (wide > centre - 0.5).astype(np.float64)
    else:
        share = (wide - (centre - 0.5)) / (width - 1) + 0.5
    shown: np.ndarray = np.rint(np.clip(share, 0, 1) * 255).astype(np.uint8)
    return shown


def robust_window(values: np.ndarray) -> Window:
    """From the half percent of darkest values to the half percent of brightest: one hot pixel changes nothing."""
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        raise UnreadableImageError("a pixel is NaN or infinite")
    low, high = np.percentile(finite, _TAILS)
    if high <= low:
        low, high = finite.min(), finite.max()
    return Window((low + high) / 2, max(float(high - low), 1e-9), "LINEAR_EXACT")


def usual_view(pixels: np.ndarray, directions: str) -> np.ndarray:
    """Turned and mirrored so that columns lead to the patient's left (else back), and rows to the back (else feet).

    `directions`: where columns and rows lead now, of L R A P H F; anything else leaves the pixels as they are.
    """
    across, down, turned = _turns(directions)
    flipped = pixels[:: -1 if down else 1, :: -1 if across else 1]
    return np.ascontiguousarray(flipped.swapaxes(0, 1) if turned else flipped)


def stored_view(pixels: np.ndarray, directions: str) -> np.ndarray:
    """The inverse of `usual_view`."""
    across, down, turned = _turns(directions)
    back = pixels.swapaxes(0, 1) if turned else pixels
    return np.ascontiguousarray(back[:: -1 if down else 1, :: -1 if across else 1])


def _turns(directions: str) -> tuple[bool, bool, bool]:
    """Whether the usual view mirrors columns and rows, and then swaps them."""
    axes = [_AXES.get(direction, "") for direction in directions]
    if len(axes) != 2 or "" in axes or axes[0] == axes[1]:
        return False, False, False
    return directions[0] != _USUAL[axes[0]], directions[1] != _USUAL[axes[1]], axes[0] > axes[1]


def refuse_huge(*sizes: int) -> None:
    """Raise UnreadableImageError if an image of these sizes is empty, or has more pixels than any scanner makes."""
    if not 0 < math.prod(sizes) <= MOST_PIXELS or min(sizes) < 1:
        raise UnreadableImageError(f"the file says that it is {'x'.join(map(str, sizes))} pixels large")


def one_image_at_most(count: int, what: str) -> None:
    """Raise UnreadableImageError for a stack: a row of a manifest is one image."""
    if count > 1:
        raise UnreadableImageError(f"the file holds {count} {what}; `consilium-site data import` makes images of them")
