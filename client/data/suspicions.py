"""What a person should look at before images train anything. None of it is certain, so none of it stops a site.

Copies: the signs of brightness steps between 16 x 17 cells (a difference hash, 256 bits), compared among all patients:
of 17 bands of bits two that differ in 16 or fewer have one in common (Norouzi, Punjani, Fleet 2012), so that only rows
which share a band are compared, and none is missed.
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
_BANDS = _BITS_APART + 1
_FEW, _AT_ONCE = 64, 512  # rows that share a band and are compared one by one; above that, rows of a table of pairs
_TEXT_SIDE = 128  # pixels; letters in smaller images are too small to tell
_BRIGHT, _DARK = 200, 110  # grey of letters, and of what is around them
_LETTERS = 4
_MOST_SHAPES = 4000  # more are noise

_ONES = np.unpackbits(np.arange(2**16, dtype=np.uint16).view(np.uint8)).reshape(-1, 16).sum(1, dtype=np.uint8)


@dataclass
class Suspicions:
    """Collects over the rows of a site, half a kilobyte for each."""

    found: list[Problem] = field(default_factory=list)
    _where: list[str] = field(default_factory=list)
    _patients: list[str] = field(default_factory=list)
    _exact: list[bytes] = field(default_factory=list)
    _small: list[bytes] = field(default_factory=list)

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
        small = Image.fromarray(grey).resize((_CELLS + 1, _CELLS), Image.Resampling.BOX)
        self._where.append(row.where)
        self._patients.append(row.patient)
        self._exact.append(hashlib.sha256(repr(row.pixels.shape).encode() + row.pixels.tobytes()).digest()[:16])
        self._small.append(small.tobytes())

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
        number: dict[bytes, int] = {}
        pictures = np.array([number.setdefault(small, len(number)) for small in self._small])
        grey = np.frombuffer(b"".join(number), np.uint8).reshape(-1, _CELLS, _CELLS + 1)
        patients = np.unique(self._patients, return_inverse=True)[1]
        for late, early in _earliest(pictures, patients, _alike(grey)).items():
            same = self._exact[late] == self._exact[early]
            yield early, late, "the same image" if same else "nearly the same image"


def _alike(grey: np.ndarray) -> np.ndarray:
    """int64 (m, 2): every pair of different small pictures uint8 (n, 16, 17) that are copies of each other, and every
    picture with itself."""
    flat = grey.reshape(len(grey), -1).astype(np.float32)
    flat -= flat.mean(1, keepdims=True)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True) + 1e-9
    itself = np.arange(len(grey)).repeat(2).reshape(-1, 2)
    close = np.concatenate([itself, *_close_pairs((grey[:, :, 1:] > grey[:, :, :-1]).reshape(len(grey), -1))])
    close = np.unique(np.sort(close, axis=1), axis=0)
    alike: np.ndarray = close[np.einsum("nd,nd->n", flat[close[:, 0]], flat[close[:, 1]]) >= _ALIKE]
    return alike


def _close_pairs(bits: np.ndarray) -> Iterator[np.ndarray]:
    """int64 (m, 2): the pairs of rows of bool (n, 256) that differ in few bits; some come more than once."""
    packed = np.packbits(bits, axis=1).view(np.uint16)
    order = np.argsort(np.abs(bits.mean(0) - 0.5), kind="stable")  # each band gets its share of bits that tell much
    for places in (order[band::_BANDS] for band in range(_BANDS)):
        keys = bits[:, places] @ (1 << np.arange(len(places)))
        rows = np.argsort(keys, kind="stable")
        keys = keys[rows]
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        sizes = np.diff(starts, append=len(rows))
        few = np.repeat(sizes <= _FEW, sizes)
        for apart in range(1, _FEW):
            first = np.flatnonzero((keys[apart:] == keys[:-apart]) & few[apart:])
            one, other = rows[first], rows[first + apart]
            close = _ONES[packed[one] ^ packed[other]].sum(1) <= _BITS_APART
            yield np.stack([one[close], other[close]], axis=1)
        for start, size in zip(starts[sizes > _FEW], sizes[sizes > _FEW], strict=True):
            yield from _close_in_table(rows[start : start + size], bits)


def _close_in_table(rows: np.ndarray, bits: np.ndarray) -> Iterator[np.ndarray]:
    """The same among some rows, each compared with each."""
    signs = np.where(bits[rows], np.float32(1), np.float32(-1))
    least = bits.shape[1] - 2 * _BITS_APART  # product of two rows of signs = bits - 2 * bits apart
    for start in range(0, len(rows), _AT_ONCE):
        one, other = np.nonzero(signs[start : start + _AT_ONCE] @ signs[: start + _AT_ONCE].T >= least)
        later = start + one > other
        yield np.stack([rows[start + one[later]], rows[other[later]]], axis=1)


def _earliest(pictures: np.ndarray, patients: np.ndarray, alike: np.ndarray) -> dict[int, int]:
    """For each row that has one, the first earlier row with an alike picture of another patient."""
    count, rows = len(pictures), np.arange(len(pictures))
    first, of_other = np.full(pictures.max() + 1, count), np.full(pictures.max() + 1, count)
    np.minimum.at(first, pictures, rows)
    elsewhere = patients != patients[first[pictures]]
    np.minimum.at(of_other, pictures[elsewhere], rows[elsewhere])
    shown, times = np.argsort(pictures, kind="stable"), np.bincount(pictures)
    one, other = np.concatenate([alike, alike[:, ::-1]]).T
    many = times[one]
    late = shown[np.repeat((np.cumsum(times) - times)[one] - (np.cumsum(many) - many), many) + np.arange(many.sum())]
    early = np.repeat(first[other], many)
    early = np.where(patients[early] == patients[late], np.repeat(of_other[other], many), early)
    best = np.full(count, count)
    np.minimum.at(best, late, np.where(early < late, early, count))
    return {int(row): int(best[row]) for row in np.flatnonzero(best < count)}


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
