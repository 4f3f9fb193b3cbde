"""What `predict` draws of an image: as it was read, under what speaks for the answer, and the nearest support image.

Colours are those of `common.pictures`, told apart by all forms of colour blindness, and never stand without words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common import pictures

_LEAST, _MOST = 384, 1024  # longer side of a panel, in pixels; an image between them has its own size
_GAP, _LINE, _TEXT, _HEADLINE = 16, 24, 16, 22  # pixels
_BAR = 14  # height of the colour bar
_GREY = 90  # under the colour bar: of a typical place in an image
_BACK, _INK, _QUIET = (24, 24, 24), (240, 240, 240), (170, 170, 170)
_NO_ANSWER = (230, 159, 0)
_FOOT = "Not a medical device. Colours show what speaks for an answer, not whether it is right."


@dataclass(frozen=True)
class Heat:
    """What speaks for an answer, on a scale that all images of a model share."""

    values: np.ndarray  # float (S, S) in [0, 1]
    of: str  # "what speaks for 'nodule'"
    scale: tuple[str, ...]  # what no colour and full colour stand for, and how fine the map is


@dataclass(frozen=True)
class Nearest:
    """The support image that is most like the image, for the network."""

    image: np.ndarray  # uint8 (S, S) or (S, S, 3)
    mask: np.ndarray | None  # uint8 (S, S)
    words: tuple[str, ...]


@dataclass(frozen=True)
class Overlay:
    """What there is to be drawn of one image."""

    image: np.ndarray  # uint8 (H, W) or (H, W, 3), as it was read
    said: str  # the headline
    answered: bool
    why: str  # how sure, or why there is no answer
    heat: Heat | None
    mask: np.ndarray | None  # uint8 (h, w), class indices; None where there is no answer
    classes: Sequence[str]  # of the mask, without the background
    nearest: Nearest


class _Paper:
    """The sheet that is drawn on; words grow with the panels, `scale` times."""

    def __init__(self, panel: tuple[int, int], lines_below: int) -> None:
        self.scale = max(1, round(panel[0] / 600))
        self.gap, self.line = _GAP * self.scale, _LINE * self.scale
        self.step = max(panel[0], _LEAST) + self.gap
        self.top, self.below = 3 * self.line + self.gap, 3 * self.line + self.gap + panel[1] + 6 * self.scale
        self.foot = self.below + max(5, lines_below) * self.line
        self.image = Image.new("RGB", (3 * self.step + self.gap, self.foot + self.line + self.gap // 2), _BACK)
        self.pen = ImageDraw.Draw(self.image)

    def write(
        self, at: tuple[int, int], words: str, width: int, colour: tuple[int, int, int] = _INK, size: int = _TEXT
    ) -> None:
        """One line, cut off where it does not fit."""
        font, cut = _font(size * self.scale), words
        while cut and self.pen.textlength(cut, font) > width - self.gap:
            cut = cut[:-2].rstrip() + "…" if len(cut) > 2 else ""
        self.pen.text(at, cut, fill=colour, font=font)


def draw(overlay: Overlay) -> Image.Image:
    """RGB: three panels side by side, with words above and below."""
    size = _panel_size(overlay.image)
    panels = [_fitted(_rgb(overlay.image), size), _explained(overlay, size), _fitted(_nearest(overlay), size)]
    paper = _Paper(size, len(overlay.classes))
    gap, step, line = paper.gap, paper.step, paper.line
    paper.write((gap, gap // 2), overlay.said, 3 * step, _INK if overlay.answered else _NO_ANSWER, _HEADLINE)
    paper.write((gap, gap // 2 + line * 5 // 4), overlay.why, 3 * step)
    titles = ("the image, as it was read", _middle_title(overlay), "nearest support image")
    for place, (panel, title) in enumerate(zip(panels, titles, strict=True)):
        paper.write((gap + place * step, paper.top - line), title, step, _QUIET)
        paper.image.paste(panel, (gap + place * step, paper.top))
    _legend(paper, overlay, gap + step, min(size[0], step - gap))
    for row, words in enumerate(overlay.nearest.words):
        paper.write((gap + 2 * step, paper.below + row * line), words, step)
    paper.write((gap, paper.foot), _FOOT, 3 * step, _QUIET)
    return paper.image


def _panel_size(image: np.ndarray) -> tuple[int, int]:
    """Width and height: the image's own, unless it is very small or large."""
    height, width = image.shape[:2]
    longer = max(height, width)
    scale = min(max(longer, _LEAST), _MOST) / longer
    return max(1, round(width * scale)), max(1, round(height * scale))


def _explained(overlay: Overlay, size: tuple[int, int]) -> Image.Image:
    panel = _fitted(_rgb(overlay.image), size)
    if overlay.heat is not None:
        heat = Image.fromarray(overlay.heat.values.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
        return Image.fromarray(pictures.glowing(np.asarray(panel), np.clip(np.asarray(heat), 0, 1)))
    return _outlined(panel, overlay.mask)


def _outlined(panel: Image.Image, mask: np.ndarray | None) -> Image.Image:
    if mask is None:
        return panel
    fitted = np.asarray(Image.fromarray(mask).resize(panel.size, Image.Resampling.NEAREST))
    return Image.fromarray(pictures.contoured(np.asarray(panel), fitted))


def _nearest(overlay: Overlay) -> np.ndarray:
    image = Image.fromarray(_rgb(overlay.nearest.image))
    side = -(-_LEAST // image.width) * image.width
    return np.asarray(_outlined(image.resize((side, side), Image.Resampling.NEAREST), overlay.nearest.mask))


def _middle_title(overlay: Overlay) -> str:
    if overlay.heat is not None:
        return overlay.heat.of
    return "outlines of what was found" if overlay.mask is not None else "no outlines: there is no answer"


def _legend(paper: _Paper, overlay: Overlay, left: int, width: int) -> None:
    top, line, scale = paper.below, paper.line, paper.scale
    if overlay.heat is None:
        for row, name in enumerate(overlay.classes if overlay.mask is not None else ()):
            colour, middle = pictures.CONTOURS[row % len(pictures.CONTOURS)], top + row * line + 10 * scale
            paper.pen.line((left, middle, left + 30 * scale, middle), fill=colour, width=4 * scale)
            paper.write((left + 40 * scale, top + row * line), name, width - 40 * scale)
        return
    bar = _BAR * scale
    ramp = np.repeat(np.linspace(0, 1, width)[None], bar, axis=0)
    grey = np.full((bar, width, 3), _GREY, dtype=np.uint8)
    paper.image.paste(Image.fromarray(pictures.glowing(grey, ramp)), (left, top))
    here = f"strongest place here: {overlay.heat.values.max(initial=0):.0%} of full colour"
    for row, words in enumerate((*overlay.heat.scale, here)):
        paper.write((left, top + bar + 4 * scale + row * line), words, width + paper.gap)


def _fitted(image: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Within `size`, enlarged by repeating pixels: nothing is drawn that was not there."""
    scale = min(size[0] / image.shape[1], size[1] / image.shape[0])
    own = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    return Image.fromarray(image).resize(own, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)


def _rgb(image: np.ndarray) -> np.ndarray:
    return np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image


@lru_cache(maxsize=4)
def _font(size: int) -> ImageFont.FreeTypeFont:
    from matplotlib import get_data_path  # labels are written in any script

    return ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)
