"""What a person should look at before images train anything. None of it is certain, so none of it stops a site.

Copies: the signs of brightness steps between 16 x 17 cells (a difference hash, 256 bits), compared among all patients.
Of the pairs of different patients in eight public sets those at 16 bits or less, with small pictures that correlate by
0.98, were the same picture or its neighbour; JPEG, shrinking and brightness move a copy by 2 to 20 bits.
Text: a row of letters is four or more bright shapes of one height on one line, close to each other, on dark.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from client.data.rows import Row
from common.errors import Problem

_CELLS = 16
_BITS_APART, _ALIKE = 16, 0.98
_FLAT = 2.0  # grey levels of standard deviation
_AT_ONCE = 512  # rows of the table of all pairs
_TEXT_SIDE = 128  # pixels; letters in smaller images are too small to tell
_BRIGHT, _DARK = 200, 110  # grey of letters, and of what is around them
_LETTERS = 4
_MOST_SHAPES = 4000  # more are noise


@dataclass
class Suspicions:
    """Collects over the rows of a site, a kilobyte for each."""

    found: list[Problem] = field(default_factory=list)
    _where: list[str] = field(default_factory=list)
    _patients: list[str] = field(default_factory=list)
    _exact: list[bytes] = field(default_factory=list)
    _hashes: list[np.ndarray] = field(default_factory=list)
    _small: list[np.ndarray] = field(default_factory=list)

    def look(self, row: Row) -> None:
        """At one image, as its file gives it."""
        grey = np.asarray(Image.fromarray(row.pixels).convert("L"))
        if grey.min() == grey.max():
            self.found.append(Problem(row.where, "every pixel has the same value", "leave the row out"))
            return
        if grey.std() < _FLAT:
            self.found.append(Problem(row.where, "the image is almost empty", "look at it; set its window anew"))
            return
        if has_text(row.pixels):
            what = "letters seem to be drawn into the image: they could name the patient, or give the label away"
            self.found.append(Problem(row.where, what, "look at it; mask them out, or leave the row out"))
        small = np.asarray(Image.fromarray(grey).resize((_CELLS + 1, _CELLS), Image.Resampling.BOX), dtype=np.int16)
        self._where.append(row.where)
        self._patients.append(row.patient)
        self._exact.append(hashlib.sha256(repr(row.pixels.shape).encode() + row.pixels.tobytes()).digest()[:16])
        self._hashes.append(np.where(small[:, 1:] > small[:, :-1], 1, -1).astype(np.int8).ravel())
        self._small.append(small.astype(np.uint8).ravel())

    def all(self) -> tuple[Problem, ...]:
        """Everything that was seen, copies last; each image's copy is told once, with the first that it resembles."""
        remedy = "if it is one patient, give both rows one pseudonym; if it is one image, leave one row out"
        copies = [
            Problem(self._where[late], f"{how} as {self._where[early]}, of another patient", remedy)
            for early, late, how in self._copies()
        ]
        return (*self.found, *copies)

    def _copies(self) -> Iterator[tuple[int, int, str]]:
        """(earlier row, later row, in words) for each row that has one."""
        if not self._where:
            return
        hashes = np.stack(self._hashes).astype(np.float32)
        patients = np.unique(self._patients, return_inverse=True)[1]
        small = np.stack(self._small).astype(np.float32)
        small -= small.mean(1, keepdims=True)
        small /= np.linalg.norm(small, axis=1, keepdims=True) + 1e-9
        least = _CELLS**2 - 2 * _BITS_APART  # product of two rows of signs = bits - 2 * bits apart
        for start in range(0, len(hashes), _AT_ONCE):
            late = slice(start, start + _AT_ONCE)
            alike = hashes[late] @ hashes[: late.stop].T >= least
            alike &= patients[late, None] != patients[None, : late.stop]
            told = set[int]()
            for row, early in np.argwhere(alike):
                this = start + int(row)
                if early < this and this not in told and small[this] @ small[early] >= _ALIKE:
                    told.add(this)
                    same = self._exact[this] == self._exact[early]
                    yield int(early), this, "the same image" if same else "nearly the same image"


def has_text(pixels: np.ndarray) -> bool:
    """Whether uint8 (H, W[, 3]) seems to hold a row of bright letters on dark."""
    from scipy import ndimage

    grey = pixels if pixels.ndim == 2 else pixels.max(axis=2)
    if min(grey.shape) < _TEXT_SIDE:
        return False
    labels, count = ndimage.label(grey >= _BRIGHT, structure=np.ones((3, 3)))
    if not 0 < count <= _MOST_SHAPES:
        return False
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    letters = [
        (place[0].start, place[0].stop, place[1].start, place[1].stop)
        for place, size in zip(ndimage.find_objects(labels), sizes, strict=True)
        if _like_a_letter(place, int(size), grey)
    ]
    return _in_a_line(np.array(letters)) if len(letters) >= _LETTERS else False


def _like_a_letter(place: tuple[slice, slice], size: int, grey: np.ndarray) -> bool:
    height, width = (side.stop - side.start for side in place)
    if not (6 <= height <= grey.shape[0] / 6 and 1 <= width <= 1.6 * height and size / (height * width) > 0.15):
        return False
    rows, columns = (slice(max(0, side.start - 2), side.stop + 2) for side in place)
    around = grey[rows, columns]
    background = around[around < _BRIGHT]
    return background.size > 0.3 * around.size and float(np.median(background)) < _DARK


def _in_a_line(letters: np.ndarray) -> bool:
    """Whether enough of the boxes (top, bottom, left, right) stand side by side at one height."""
    letters = letters[np.argsort(letters[:, 2])]
    top, bottom, left, right = letters.T
    for first in range(len(letters)):
        height, here, count = bottom[first] - top[first], first, 1
        for other in range(first + 1, len(letters)):
            if left[other] - right[here] > 1.5 * height:
                break
            same_line = abs(bottom[other] - bottom[first]) <= 0.15 * height
            same_height = abs((bottom[other] - top[other]) - height) <= 0.35 * height
            if same_line and same_height and left[other] >= right[here] - 1:
                here, count = other, count + 1
        if count >= _LETTERS:
            return True
    return False
